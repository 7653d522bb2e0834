"""``insvp data``."""

from types import SimpleNamespace

from insvp_fast.commands import cli


def test_data_list_and_check(tmp_path, capsys, monkeypatch):
    from insvp_fast import data

    assert cli.main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 29 + 2 and "cub " in printed and "vtab/kitti " in printed

    class Report(SimpleNamespace):
        def __str__(self) -> str:
            return "cub: 200 classes"

    for ok, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(data, "check", lambda name, root, ok=ok: Report(ok=ok), raising=False)
        assert cli.main(["data", "check", "cub", "--root", str(tmp_path)]) == status
        assert capsys.readouterr().out == "cub: 200 classes\n"
