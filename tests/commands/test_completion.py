"""``insvp --print-completion``."""

import shutil
import subprocess

import pytest

from insvp_fast.commands import cli
from insvp_fast.training.recipe import METHODS

pytest.importorskip("shtab")


def print_script(shell, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_choices_and_files(tmp_path, capsys):
    (tmp_path / "insvp.bash").write_text(print_script("bash", capsys))
    (tmp_path / "weights.pth").touch()
    (tmp_path / "pictures").mkdir()
    cases = {
        "pre": ["predict"],
        "train --aug": ["--augmentation"],
        "train --amp ": ["auto", "bf16", "fp16", "off"],
        "train --method vpt_": [name for name in METHODS if name.startswith("vpt_")],
        "train --trackers ": ["tensorboard", "wandb"],
        "train --specific-inp": ["--specific-input"],  # one that the short help leaves out
        "data ": ["check", "list"],
        "train --checkpoint we": ["weights.pth"],
        "train --root ": ["pictures"],
        "eval --js": ["--json"],
    }
    program = 'source insvp.bash; while IFS= read -r line; do read -ra COMP_WORDS <<< "insvp $line"\n'
    program += '[[ "$line" == *" " ]] && COMP_WORDS+=(""); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()\n'
    program += '_shtab_insvp; echo "${COMPREPLY[@]}"; done'
    lines = "".join(f"{line}\n" for line in cases)
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, input=lines, capture_output=True, text=True, check=True
    )
    found = [line.split() for line in done.stdout.splitlines()]
    expected = list(cases.values())
    assert [sorted(names) for names in found] == [sorted(names) for names in expected]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(shell, capsys):
    script = print_script(shell, capsys)
    assert "augmentation" in script and "vpt_shallow" in script
