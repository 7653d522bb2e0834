"""What the tests of models share: a fast model against the reference, measured by the reference in double precision."""

import contextlib
import copy
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from insvp_fast import unsupported_reason
from insvp_fast.testing import assert_within_budget, relative_error, trained_gradients


class MasksOfTheCPU(TorchDispatchMode):
    """Dropout on GPUs draws other masks in fp64 than in fp32 from the same seed; these are the same."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.native_dropout.default:
            return function(*args, **(kwargs or {}))
        x, p, _ = args  # in training: else nothing is called
        mask = (torch.rand(x.shape, device="cpu") >= p).to(x.device)
        return x * mask / (1 - p), mask


def assert_equal_numbers(reference, fast, image, tolerance=1e-5, settings=({},)):
    """Errors of logits and gradients are at most the tolerance, or twice those of the reference in fp32.

    So with each of ``settings``, attributes that the fast model is given.
    """
    with MasksOfTheCPU() if image.is_cuda and dropout_is_on(fast) else contextlib.nullcontext():
        exact = trained_gradients(copy.deepcopy(reference).double(), doubled(image))
        plain, found = trained_gradients(reference, image), [with_settings(fast, image, one) for one in settings]
    assert relative_error(plain["logits"], exact["logits"]) < 1e-3, "other masks in double precision"
    for values in found:
        assert values.keys() == exact.keys()
        for name, value in values.items():
            allowed = max(tolerance, 2 * relative_error(plain[name], exact[name]))
            assert relative_error(value, exact[name]) <= allowed, f"{name}: {relative_error(value, exact[name]):.1e}"


def assert_replaced_modules_are_noticed(fast, called=frozenset()):
    """The general path is taken where a module of the backbone, without modules of its own, is another.

    Except for those in ``called``, or in a module there, which the fast path calls, whatever they are.
    """
    called = {*called, "norm_pre", "fc_norm", "attn_pool", "head_drop", "head", "head_dist"}
    for path, module in [*fast.backbone.named_modules()]:
        parent, _, name = path.rpartition(".")
        if not module._modules and not called & {path, path.partition(".")[0]}:
            siblings = fast.backbone.get_submodule(parent)._modules
            siblings[name] = torch.nn.Tanh()
            assert unsupported_reason(fast) is not None, path
            siblings[name] = module
    assert unsupported_reason(fast) is None


def doubled(image):
    """In double precision and in the same strides, gaps included, on which the order of dropout's masks depends."""
    memory = image.as_strided([image.untyped_storage().nbytes() // image.element_size()], [1], 0)
    return memory.double().as_strided(image.shape, image.stride(), image.storage_offset())


def with_settings(model, image, settings):
    for name, value in settings.items():
        setattr(model, name, value)
    return trained_gradients(model, image)


def dropout_is_on(model):
    return any(isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in model.modules())


DRAWS = 8  # of models and images, for assert_errors_within_budget


def assert_errors_within_budget(draws, dtype, what=""):
    """The root mean square error of each number is at most twice that of the reference, plus one rounding in ``dtype``.

    ``draws`` are pairs of models with an image: of each what the fast model gives, the reference, and the reference in
    double precision. One draw would not do: the error of a bias of three numbers is a matter of chance, and so is that
    of rounded weights for all images of a model, since a folded weight is rounded once where the reference rounds two.
    """
    squares = defaultdict(list)
    for values, plain, exact in draws:
        for name, value in values.items():
            assert value.dtype == plain[name].dtype, f"{what}{name}"
            squares[name].append([relative_error(x, exact[name]) ** 2 for x in (value, plain[name])])
    for name, pairs in squares.items():
        error, rough = torch.tensor(pairs).mean(0).sqrt().tolist()
        allowed = 2 * rough + torch.finfo(dtype).eps
        assert error <= allowed, f"{what}{name}: {error:.2e}, the reference {rough:.2e}"


def assert_low_precision(make, amp, dtype):
    """``assert_errors_within_budget`` of the pairs of models and the images that ``make`` draws.

    In ``dtype`` by autocast with ``amp``, else models and images are in it.
    """
    draws, autocast = [], dtype if amp else None
    for seed in range(DRAWS):
        torch.manual_seed(seed)  # trained_gradients sets it too, always to the same
        reference, fast, image = make()
        if not amp:
            reference, fast, image = (x.to(dtype) for x in (reference, fast, image))
        exact = trained_gradients(copy.deepcopy(reference).double(), image.double())
        plain, values = (trained_gradients(model, image, autocast=autocast) for model in (reference, fast))
        assert values["logits"].dtype == dtype
        draws.append((values, plain, exact))
    assert_errors_within_budget(draws, dtype)


def assert_bf16_within_budget(reference, fast, image, autocast):
    """Errors in bf16, under autocast or of models in bf16, are within the budget of ``assert_within_budget``."""
    if not autocast:
        reference, fast, image = (x.bfloat16() for x in (reference, fast, image))
    exact = trained_gradients(copy.deepcopy(reference).double(), image.double())
    dtype = torch.bfloat16 if autocast else None
    plain, values = (trained_gradients(model, image, autocast=dtype) for model in (reference, fast))
    for name, value in values.items():
        assert value.dtype == plain[name].dtype
        assert_within_budget(value, plain[name], exact[name], torch.bfloat16, name)
