"""``insvp data``."""

from insvp_fast.commands import cli
from insvp_fast.data.verify import Report


def test_data_list_and_check(tmp_path, capsys, monkeypatch):
    from insvp_fast import data

    assert cli.main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 29 + 2 and "cub " in printed and "vtab/kitti " in printed

    for unreadable, status in (([], 0), (["a.png: not an image"], 1)):
        report = Report("cub", {"train": 3}, 200, unreadable, [])
        monkeypatch.setattr(data, "check", lambda name, root, report=report: report)
        assert cli.main(["data", "check", "cub", "--root", str(tmp_path)]) == status
        printed = capsys.readouterr()
        assert printed.out == f"{report}\n"
        assert printed.err == ("insvp: error: cub: some images cannot be read\n" if unreadable else "")


def test_data_check_names_what_it_was_given(capsys):
    assert cli.main(["data", "check", "nope"]) == 1
    assert capsys.readouterr().err.startswith("insvp: error: nope: no such folder or list")
