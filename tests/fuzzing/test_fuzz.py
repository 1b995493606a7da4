"""Short run of the fuzzer; ``python -m benchmarks.fuzz`` has long ones."""

import pytest

import ggml_cffi as ggml
from tests import cases
from tests.fuzzing import calls, files, hunt
from tests.fuzzing.calls import T
from tests.fuzzing.child import Child

SEED = 7
EACH = 4  # calls of an operation


@pytest.fixture
def child(request):
    made = Child(request.param)
    yield made
    made.close()


def shown(tally):
    return "\n".join(f"{d.what}\n    {d.job}\n    {d.detail[-500:]}" for d in tally.defects.values())


@pytest.mark.parametrize("child", ["calls"], indirect=True)
def test_random_calls_are_refused_or_computed_correctly(child):
    tally = hunt.Tally()
    for op in calls.operations():
        tally.add(hunt.hunt(calls.calls(op), child, SEED, EACH, lambda call: call.op))
    assert not tally.defects, shown(tally)
    assert tally.outcomes["refused"] > 100
    assert tally.outcomes["compared"] > 100


@pytest.mark.parametrize("child", ["files"], indirect=True)
def test_damaged_files_are_refused_or_read(child):
    tally = hunt.hunt(files.damages(files.BASES[:5]), child, SEED, 300, lambda job: job.base)
    assert not tally.defects, shown(tally)
    assert tally.outcomes["refused"] > 100
    assert tally.outcomes["compared"] + tally.outcomes["computed"] > 10


@pytest.mark.parametrize("child", ["calls"], indirect=True)
def test_the_child_reports_refusals_and_crashes(child, monkeypatch):
    """Send right and wrong calls, a crash, and a call to the process after it."""
    add = calls.Call("add", {"a": T((2, 3)), "b": T((3,))})
    assert child.ask(add).kind == "compared"
    assert child.ask(calls.Call("add", {"a": T((2, 3)), "b": T((2,))})).kind == "refused"
    died = child.ask(calls.Call("_die", {}))
    assert (died.kind, "SIGSEGV" in died.what) == ("death", True)
    assert child.ask(add).kind == "compared"


def test_defects_are_shrunk():
    class Dies:
        def ask(self, call):
            big = call is not None and sum(len(t.shape) for t in call.operands().values()) > 2
            return hunt.Outcome("death", "call", "of large ranks") if big else hunt.Outcome("refused")

    tally = hunt.hunt(calls.scratch("add"), Dies(), SEED, 50, lambda call: call.op)
    (defect,) = tally.defects.values()
    assert sum(len(t.shape) for t in calls.parse(defect.job).operands().values()) <= 4


def test_a_printed_call_can_be_parsed_again():
    for case in cases.CASES:
        call = calls.Call(case.op, {name: calls.lift(value) for name, value in case.arguments.items()})
        assert str(calls.parse(str(call))) == str(call)


def test_every_operation_is_called():
    classes = {name for name in ggml.ops.__all__ if name[0].isupper()}
    assert set(ggml.ops.__all__) - set(calls.operations()) == classes
