"""``insvp tsne``."""

from insvp_fast.commands import cli


def test_tsne_draws_the_test_images(run, tmp_path, capsys):
    file = tmp_path / "new" / "tsne.pdf"
    assert cli.main(["tsne", str(run), "--output", str(file), "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "16 images of 6 classes, silhouette score" and lines[-1] == f"written: {file}"
    titles, scores = zip(*(line.strip().split(": ") for line in lines[1:-1]), strict=True)
    assert titles == ("specific prompts", "features without prompts", "features with prompts")
    assert all(-1 <= float(score) <= 1 for score in scores)
    assert file.read_bytes().startswith(b"%PDF")


def test_tsne_refuses_other_formats_and_too_few_images(run, tmp_path, capsys):
    assert cli.main(["tsne", str(run), "--output", "tsne.xyz"]) == 1
    assert "expected a name that ends in .png" in capsys.readouterr().err
    assert cli.main(["tsne", str(run), "--images", "2", "--output", str(tmp_path / "a.png")]) == 1
    assert "t-SNE of 2 images" in capsys.readouterr().err
