"""A step that fails or is interrupted anywhere leaves model and pruner as they were, or is done."""

import contextlib
import copy
import inspect
import signal
import sys
import threading
import time
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.psap_cases import TOTAL, make
from tp_importance import Budget, BudgetPruner, CATROImportance, recalibrate_batchnorm, refitted_step
from tp_importance.core.guards import Guard, preserved, transaction, written
from tp_importance.graph.remap import Survivors
from tp_importance.pruning.target import PruningTarget
from tp_importance.statistics.gradients import loss_gradients
from tp_importance.testing import Snapshot, loader_for, make_network, same_values


@pytest.fixture(autouse=True)
def python_s_handler():
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Injected(BaseException):
    pass


def fresh():
    model, x = make_network("residual")
    pruner = BudgetPruner(
        model.train(), x, loader_for(x), importance=CATROImportance(), budget=Budget(macs=0.5), verify=False
    )
    return pruner.collect()


def known(pruner):
    """What a pruner knows; its graph is compared by what it would do next."""
    return {
        "widths": pruner.groups.widths,
        "cost": pruner.cost_model.dense,
        "history": pruner.pruning_history(),
        "curves": None if pruner._known_curves() is None else sorted(pruner._known_curves()),
        "excluded": [e.name for e in pruner.groups.excluded],
        "latency": pruner.target._latency,
        "reference": pruner.target._reference,
    }


class AtCall:
    """Raise at the n-th call that a function of the package makes itself."""

    def __init__(self, code, n):
        self.code, self.left, self.raised = code, n, ""

    def __enter__(self):
        sys.setprofile(self.profile)

    def __exit__(self, *_):
        sys.setprofile(None)

    def profile(self, frame, event, arg):
        caller = frame if event == "c_call" else frame.f_back
        if event not in ("call", "c_call") or caller is None or caller.f_code is not self.code:
            return
        name = arg.__name__ if event == "c_call" else frame.f_code.co_name
        if name in ("__enter__", "__exit__", "commit"):  # they begin and end the transaction
            return
        self.left -= 1
        if self.left == 0:
            sys.setprofile(None)
            self.raised = name
            raise Injected(name)


@pytest.mark.parametrize("options", [{"refit": "batchnorm"}, {}, {"refit": "parallel"}])
def test_an_exception_at_any_call_of_a_step_undoes_it(options):
    pruner, names = fresh(), set()
    plan, before, snapshot = pruner.plan(), known(pruner), Snapshot(pruner.model)
    for n in range(1, 200):
        injection = AtCall(inspect.unwrap(PruningTarget.apply).__code__, n)
        try:
            with injection:
                pruner.apply(plan, **options)
        except Injected:
            names.add(injection.raised)
            if pruner.groups.widths == plan.widths:  # after the commit: done, all of it
                assert pruner.cost_model.dense == plan.cost and pruner.pruning_history()
                break
            snapshot.check()
            assert known(pruner) == before
            continue
        break
    assert {"remove_units", "inner", "_adopting"} <= names  # "inner": the tracing anew, a phase
    assert ("recalibrate_batchnorm" in names) is ("refit" in options)
    assert pruner.groups.widths == plan.widths  # the same pruner then prunes
    pruner.model.train()(pruner.example_inputs).sum().backward()


@pytest.mark.parametrize("options", [{"refit": "batchnorm"}, {"refit": "sequential"}])
def test_ctrl_c_at_any_time_leaves_all_or_nothing(options):
    reference = fresh()
    start = time.perf_counter()
    reference.apply(plan := reference.plan(), **options)
    seconds, undone, done = time.perf_counter() - start, 0, 0
    generator = torch.Generator().manual_seed(0)
    pruner = fresh()
    before, snapshot = known(pruner), Snapshot(pruner.model)
    for attempt in range(64):
        if attempt >= 16 and undone >= 3:
            break
        delay = 1.2 * seconds * torch.rand((), generator=generator).item()
        timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
        start = time.perf_counter()
        try:
            timer.start()
            pruner.apply(plan, **options)
            seconds = min(seconds, time.perf_counter() - start)  # the first step may have been slow
            timer.join()
            time.sleep(0.001)  # an interrupt after the step
        except KeyboardInterrupt:
            pass
        finally:
            with contextlib.suppress(KeyboardInterrupt):
                timer.join()
                time.sleep(0.001)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if pruner.groups.widths == plan.widths:
            assert known(pruner) == {**known(reference), "reference": pruner.target._reference}
            assert all(
                torch.equal(a, b) for a, b in zip(pruner.model.buffers(), reference.model.buffers(), strict=True)
            )
            pruner, done = fresh(), done + 1
            before, snapshot = known(pruner), Snapshot(pruner.model)
            continue
        undone += 1
        snapshot.check()
        assert known(pruner) == before
    assert undone >= 3


@pytest.mark.parametrize("early", [False, True])
def test_what_is_held_and_when(early):
    class Slow(Guard):
        def _note(self):
            self.log = ["noted"]
            if early:
                signal.raise_signal(signal.SIGINT)

        def _restore(self, failed):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            self.log.append(failed)

    guard = Slow()
    with pytest.raises(KeyboardInterrupt), guard:
        guard.log.append("block")
        guard.commit()
        signal.raise_signal(signal.SIGINT)
        guard.log.append("end")
    assert guard.log == (["noted", True] if early else ["noted", "block", "end", False])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_inside_a_block_come_at_once_and_nested_guards_restore():
    net = nn.Linear(3, 2)
    weight, log = net.weight.detach().clone(), []
    with pytest.raises(KeyboardInterrupt), transaction(net), written([net.weight]), preserved(net):
        net.eval()
        net.weight.data.zero_()
        net.extra = 1
        signal.raise_signal(signal.SIGINT)
        log.append("not reached")
    assert not log and torch.equal(net.weight, weight) and net.training and not hasattr(net, "extra")


def test_other_handlers_and_threads():
    seen = []
    old = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        guard = transaction(nn.Linear(1, 1))
        with guard:
            signal.raise_signal(signal.SIGINT)  # somebody else's handler need not raise
            assert seen == [1]
            guard.commit()
            signal.raise_signal(signal.SIGINT)
            assert seen == [1]
        assert seen == [1, 1]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with transaction(nn.Linear(1, 1)):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, old)
    failed = []

    def elsewhere():
        try:
            with preserved(nn.Linear(1, 1)):
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed


def test_recalibration_that_is_interrupted_while_writing():
    model, x = make_network("residual")
    dense = copy.deepcopy(model)
    snapshot, data = Snapshot(model), [a for a, _ in loader_for(x)]

    def interrupting():
        yield from data
        signal.raise_signal(signal.SIGINT)

    for reference in (None, dense):
        with pytest.raises(KeyboardInterrupt):
            recalibrate_batchnorm(model, interrupting(), reference=reference)
        snapshot.check()
        assert all(torch.equal(a, b) for a, b in zip(dense.buffers(), model.buffers(), strict=True))


def test_ctrl_c_while_a_finished_training_is_wrapped_up(monkeypatch):
    """The surgery is done, the optimizer follows: the interrupt waits, and nothing is half."""
    run = make(budget=Budget(macs=0.5)).train(TOTAL)
    remap = Survivors.remap_optimizer

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        remap(self, *args)

    monkeypatch.setattr(Survivors, "remap_optimizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.pruner.finish()
    assert run.pruner._finished and not any(m._forward_pre_hooks for m in run.model.modules())
    run.train(2, pruning=False)  # model and optimizer belong together


def test_an_error_while_a_finished_training_is_wrapped_up_undoes_it(monkeypatch):
    run, twin = make().train(TOTAL), make().train(TOTAL)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(Survivors, "settle", planted)
        run.pruner.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the optimizer still trains the parameters of the network
        run.optimizer.step()
    twin.optimizer.step()
    assert same_values(run.model, twin.model)
    for each in (run, twin):
        each.pruner.finish()
    assert same_values(run.model, twin.model)


def planted(*_):
    raise RuntimeError("planted")


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_ctrl_c_in_a_step_of_the_host(mode):
    model, x = make_network("residual")
    snapshot, data = Snapshot(model), [a for a, _ in loader_for(x)]
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear)]

    class Interrupting(list):
        def __iter__(self):
            yield from super().__iter__()
            signal.raise_signal(signal.SIGINT)

    pruner = tp.pruner.BasePruner(
        model, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=ignored
    )
    with pytest.raises(KeyboardInterrupt):
        refitted_step(pruner, x, Interrupting(data), mode)
    snapshot.check()


def test_ctrl_c_while_gradients_come_back():
    model, x = make_network("plain")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    zero = model.zero_grad

    def interrupted(*args, **kwargs):
        zero(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), loss_gradients(model, loader_for(x)):
        model.zero_grad = interrupted
    assert all(p.grad is not None and bool(p.grad.eq(1).all()) for p in model.parameters())


def test_an_interrupt_while_the_handler_is_set_leaves_no_handler_behind(monkeypatch):
    """``signal.signal`` is Python code around the function in C: Ctrl-C may come right behind that."""
    before, real = signal.getsignal(signal.SIGINT), signal.signal

    def slow(number, handler):
        old = real(number, handler)
        if getattr(handler, "__name__", "") == "_on_interrupt":
            signal.raise_signal(number)
        return old

    monkeypatch.setattr(signal, "signal", slow)
    with pytest.raises(KeyboardInterrupt), preserved(nn.Linear(2, 2)):
        pass
    assert signal.getsignal(signal.SIGINT) is before
