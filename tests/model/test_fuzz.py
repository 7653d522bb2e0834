"""The first cases of ``tools/fuzz.py``, and whether it finds errors."""

import pytest
import torch

from tools import fuzz


@pytest.mark.slow
def test_drawn_models(threads):
    threads(1)
    assert fuzz.run(60, seed=0) == []


def test_a_wrong_number_is_found(monkeypatch):
    """Also one as small as a rounding error, and a finite number in the place of NaN."""
    monkeypatch.setattr(fuzz, "DRAWS", (8,))
    case = fuzz.Case(backbone={"img_size": (16, 16), "patch_size": 8, "embed_dim": 8, "num_heads": 2, "depth": 1})
    assert fuzz.check(case) is None
    compute = fuzz.compute

    def off(by, at):
        def wrong(model, x, case, exact=False):
            results = compute(model, x, case, exact)
            if type(model).__name__ == "InsVPViT":
                results[at] = torch.nan_to_num(results[at]) * (1 + by)
            return results

        return wrong

    for by, at, settings in [
        (1e-4, "logits", {}),
        (1e-4, "head.weight", {}),
        (0.1, "image", {"autocast": "bf16"}),
        (1e-12, "logits", {"dtype": "fp64"}),
        (0.0, "image", {"values": "nan"}),
    ]:
        bad = fuzz.dataclasses.replace(case, **settings)
        monkeypatch.setattr(fuzz, "compute", off(by, at))
        wrong = fuzz.check(bad)
        assert wrong is not None and wrong.startswith(at), wrong
        monkeypatch.setattr(fuzz, "compute", compute)
        assert fuzz.check(bad) is None
        assert eval(repr(bad), {"Case": fuzz.Case}) == bad


def test_an_error_on_one_side_is_found(monkeypatch):
    case = fuzz.Case(backbone={"img_size": (16, 16), "patch_size": 8, "embed_dim": 8, "num_heads": 2, "depth": 1})
    assert fuzz.check(fuzz.dataclasses.replace(case, size=(17, 16))) is None  # on both
    monkeypatch.setattr("insvp_fast.InsVPViT.forward", lambda self, image: 1 / 0)
    assert fuzz.check(case) == "the reference: no error; fast: ZeroDivisionError: division by zero"
