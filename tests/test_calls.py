"""Calls made again (medusa_kernels/_calls.py): compiled and in Python, what tells them apart and who makes them."""

import ctypes
import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medusa_kernels import _calls

COMPILED = not isinstance(_calls.new_calls(), _calls.PythonCalls)


@pytest.mark.skipif(not list(Path(_calls.__file__).parent.glob("_fast_calls*")), reason="built without")
def test_compiled_where_torch_has_what_it_needs():
    assert COMPILED == hasattr(Tensor, "__dlpack_c_exchange_api__")


@pytest.fixture(params=["compiled", "python"])
def calls(request):
    if request.param == "python":
        return _calls.PythonCalls()
    if not COMPILED:
        pytest.skip("no compiled calls here")
    return _calls.new_calls()


STORAGE = torch.zeros(4096)


def tensor(shape=(2, 3), strides=None, offset=0, dtype=torch.float32) -> Tensor:
    x = STORAGE.view(dtype)
    start = (-x.data_ptr() % 64) // x.itemsize
    return x.as_strided(shape, strides or torch.empty(shape).stride(), start + offset)


def test_every_difference_is_told(calls):
    """All pairs of different tensors or options; equal ones made anew are the same call."""

    def variants():
        return [
            *((x,) for x in (
                None, tensor(), tensor((3, 2)), tensor((6,)), tensor((6, 1)), tensor((1, 6)), tensor(()), tensor((0,)),
                tensor(strides=(4, 1)), tensor(strides=(1, 2)), tensor(strides=(0, 1)), tensor(offset=1),
                tensor(dtype=torch.int32), tensor(dtype=torch.bfloat16), tensor(dtype=torch.float16),
                tensor(dtype=torch.float8_e4m3fn), tensor(dtype=torch.int64), tensor(dtype=torch.bool),
            )),
            (tensor(), None), (None, tensor()), (tensor(), tensor()), (),
            # Looks repeat: which of them, and of the tensor before which.
            (tensor(), tensor(), tensor()), (tensor(), tensor(offset=1)), (tensor(offset=1), tensor()),
            (tensor(), tensor(offset=1), tensor(offset=1)), (tensor(), tensor(), tensor(offset=1)),
            (tensor(), None, tensor()), (tensor(offset=1), None, tensor()), (tensor(), None, tensor(offset=1)),
            (tensor(), tensor(dtype=torch.int32)), (tensor(), tensor(strides=(4, 1))), (tensor(), tensor((3, 2))),
            (tensor(()), tensor(())), (tensor((1,)), tensor(())),
            # Tuples and lists among them.
            ((),), ((None,),), ((tensor(),),), ((tensor(), tensor()),), ((tensor(),), (tensor(),)),
            (tensor(), (tensor(),)), ((tensor(),), tensor()), (tensor(), (tensor(), tensor(offset=1))),
            ([tensor()], [tensor(), tensor()]), ([tensor(), tensor()], [tensor()]),
        ]  # fmt: skip

    options = [
        (), (None,), (0,), (0.0,), (-0.5,), (False,), (True,), (1,), (1.0,), (2**62,), (0, 0), (0.0, None), (None, 0.0),
    ]  # fmt: skip
    pairs = list(itertools.product(variants(), options))
    for number, (tensors, option) in enumerate(pairs):
        assert calls.find(tensors, option) is None and calls.call(tensors, option) is None, (tensors, option)
        calls.remember(tensors, option, lambda addresses, number=number: (number, addresses) == expected)
    assert len(calls.values()) == len(pairs)
    for number, (tensors, option) in enumerate(itertools.product(variants(), options)):
        flat = [x for item in tensors for x in (item if isinstance(item, (tuple, list)) else [item])]
        expected = number, [0 if x is None else x.data_ptr() for x in flat]
        assert calls.call(tensors, option) is True
    calls.clear()
    assert calls.values() == [] and calls.call((), ()) is None


def test_addresses_that_differ_by_16_are_one_call(calls):
    seen = []
    calls.remember((tensor(),), (), lambda addresses: bool(seen.append(addresses)))
    assert calls.call((tensor(offset=4),), ()) is False
    assert seen == [[tensor(offset=4).data_ptr()]]


def test_tuples_and_lists_are_one_call(calls):
    calls.remember((tensor(), (tensor(), None)), (), lambda addresses: True)
    assert calls.call((tensor(), [tensor(), None]), ()) is True
    calls.remember((tensor(), (tensor(), None)), (), lambda addresses: False)
    assert len(calls.values()) == 1


class Odd(Tensor):
    """A subclass, which may be anything."""


class Seen(TorchDispatchMode):
    """Names of the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "tensors, options",
    [
        ((tensor().as_subclass(Odd),), ()), ((3,), ()), (([1.0],), ()), ((tensor(),), ("x",)), ((tensor(),), (2j,)),
        ((tensor(),), (torch.tensor(1.0),)), ((torch.zeros(2, device="meta").as_subclass(Odd),), ()),
        ((torch.zeros(2, 2).to_sparse(),), ()), (((tensor(), tensor().as_subclass(Odd)),), ()), ((([tensor()],),), ()),
        (([3],), ()),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_told_is_not_known(calls, tensors, options):
    calls.remember(tensors, options, lambda addresses: True)
    assert calls.values() == [] and calls.find(tensors, options) is None and calls.call(tensors, options) is None


def test_parameters_are_tensors(calls):
    calls.remember((torch.nn.Parameter(tensor(), requires_grad=False),), (), lambda addresses: True)
    assert calls.call((tensor(),), ()) is True


def test_the_last_one_remembered_counts_and_none_is_kept_alive(calls):
    again = [lambda addresses, result=result: result for result in (False, True)]
    for function in again:
        calls.remember((tensor(),), (), function)
    assert calls.call((tensor(),), ()) is True and len(calls.values()) == 1
    references = [weakref.ref(function) for function in again]
    del again, function
    gc.collect()
    assert references[0]() is None and references[1]() is not None
    calls.clear()
    assert references[1]() is None


def test_no_more_than_so_many(calls):
    for number in range(_calls.MAX_CALLS + 10):
        calls.remember((), (number,), lambda addresses: True)
    assert len(calls.values()) == 10


def test_what_a_call_raises_comes_through(calls):
    def fails(addresses):
        calls.clear()  # itself released while it runs
        raise ValueError("as it is")

    calls.remember((tensor(),), (), fails)
    del fails
    with pytest.raises(ValueError, match="as it is"):
        calls.call((tensor(),), ())


@pytest.mark.skipif(not COMPILED, reason="no compiled calls here")
def test_wrong_arguments_are_errors():
    calls = _calls.new_calls()
    for function in (calls.call, calls.find, calls.remember):
        with pytest.raises(TypeError, match="arguments"):
            function(())
    with pytest.raises((TypeError, SystemError)):
        calls.call([tensor()], ())
    with pytest.raises(TypeError):
        type(calls)()


class Native:
    """A call that is made without Python: it notes down what it is given; plan 2 goes wrong."""

    def __init__(self, plan: int, device: int, seen: list):
        error = ctypes.create_string_buffer(b"as it is")

        @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p)
        def function(plan, addresses, stream):
            seen.append((plan, addresses[0], addresses[1], stream))
            return ctypes.addressof(error) if plan == 2 else None

        self.function = function  # kept alive
        self.native = ctypes.cast(function, ctypes.c_void_p).value, plan, device


def check_native(x: Tensor, stream: int | None) -> None:
    calls, seen = _calls.new_calls(), []
    for plan in (1, 2):
        calls.remember((x, None), (plan,), Native(plan, -1 if x.get_device() < 0 else x.get_device(), seen))
    assert calls.call((x, None), (1,)) is True
    with pytest.raises(RuntimeError, match="as it is"):
        calls.call((x, None), (2,))
    assert seen == [(1, x.data_ptr(), 0, stream), (2, x.data_ptr(), 0, stream)]


@pytest.mark.skipif(not COMPILED, reason="no compiled calls here")
def test_native_calls():
    check_native(torch.zeros(3), None)


@pytest.mark.skipif(not COMPILED, reason="no compiled calls here")
@pytest.mark.gpu
def test_gpu_native_calls():
    """On the current stream."""
    with torch.cuda.stream(torch.cuda.Stream()):
        check_native(torch.zeros(3, device="cuda"), torch.cuda.current_stream().cuda_stream)
