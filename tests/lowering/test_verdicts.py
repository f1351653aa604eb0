"""When kernels are compared with PyTorch, and what follows from it; the kernels are the tests' own.

That each kernel passes its comparison is tested under Triton's interpreter, in
test_kernels_interpreted.py, and on a card, in test_verdicts_gpu.py.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import mhf_compiler.compat  # noqa: E402
from mhf_compiler.lowering.cpu import blocked  # noqa: E402
from mhf_compiler.lowering.kernels import (  # noqa: E402
    batched,
    dispatch,
    hopper,
    replay,
    verdicts,
)
from mhf_compiler.lowering.kernels.verdicts import (  # noqa: E402
    FILLS,
    Results,
    WrongKernelError,
    trusts,
)
from mhf_compiler.lowering.problem import Gradients, Problem  # noqa: E402
from mhf_compiler.lowering.tiles import (  # noqa: E402
    Sizes,
    Tile,
    portable,
    refuse,
    refuse_none,
    select,
)

CARD = torch.device("cuda", 0)
ON_HOPPER = Sizes(
    tokens=4096,
    heads=16,
    groups=16,
    head_dim=128,
    sub_networks=22,
    hidden=256,
    gated=True,
    routed=True,
    biased=(False, False, False),
    dtype=torch.bfloat16,
    capability=(9, 0),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Which is faster than several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One that captures nothing, with an empty folder."""
    monkeypatch.setattr(verdicts, "card", lambda device: "a card")
    monkeypatch.setattr(verdicts, "capability", lambda device: (9, 0))
    monkeypatch.delenv("MHF_COMPILER_CHECK_KERNELS", raising=False)
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(mhf_compiler.compat, "cache_folder", lambda: tmp_path)
    verdicts.forget()
    yield
    verdicts.forget()


class Kernel:
    """What it computes and what PyTorch does, and how often that was compared."""

    def __init__(self, found: Tensor, expected: Tensor | None = None) -> None:
        self.results: Results | None = [(found, found if expected is None else expected)]
        self.compared = 0

    def __call__(self) -> Results | None:
        self.compared += 1
        return self.results

    def trusted(self, about: object = "", device: torch.device = CARD) -> bool:
        return trusts("plain", "forward", about, device, self)


RIGHT = torch.tensor([[3.0, 4.0], [0.0, 1.0]])


def wrong(x: Tensor = RIGHT) -> Kernel:
    return Kernel(x + torch.tensor([[0.0, 0.0], [0.0, 1.0]]).to(x.dtype), x)


class TestAgreement:
    def test_rounding_is_allowed(self) -> None:
        exact = torch.randn(50, 64, dtype=torch.float64)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert Kernel(exact.to(dtype), exact).trusted(dtype)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_row_is_enough(self, dtype: torch.dtype) -> None:
        """Of 1000, in which a norm of everything would not see it."""
        exact = torch.randn(1000, 64, dtype=torch.float64)
        found = exact.to(dtype)
        found[7] *= 0.9
        assert not Kernel(found, exact).trusted()

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_what_was_not_written_is_wrong(self) -> None:
        found = RIGHT.clone()
        found[0, 0] = float("nan")
        assert not Kernel(found, RIGHT).trusted()


class TestOnce:
    def test_a_right_kernel(self, tmp_path: Path) -> None:
        kernel = Kernel(RIGHT)
        assert kernel.trusted()
        assert kernel.trusted()
        assert kernel.compared == 1
        verdicts.forget()  # as in the next process
        assert kernel.trusted()
        assert kernel.compared == 1
        assert len(list(tmp_path.rglob("*.json"))) == 1
        assert kernel.trusted("other sizes")
        assert kernel.compared == 2

    def test_a_wrong_kernel_is_told_of_in_each_process(self) -> None:
        kernel = wrong()
        for _ in range(2):
            verdicts.forget()
            with pytest.warns(RuntimeWarning, match="'forward' does not compute .* on a card"):
                assert not kernel.trusted()
            assert not kernel.trusted()
        assert kernel.compared == 1

    @pytest.mark.parametrize(
        ("where", "name", "value"),
        [
            (triton, "__version__", "4.0"),
            (verdicts, "assembler", lambda capability: "ptxas V99"),
            (verdicts, "kernels_hash", lambda: "edited"),
            (verdicts, "card", lambda device: "another card"),
            (verdicts, "capability", lambda device: (10, 3)),
        ],
        ids=["Triton", "assembler", "source", "card", "capability"],
    )
    def test_what_a_verdict_depends_on(
        self, where: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernel = Kernel(RIGHT)
        kernel.trusted()
        verdicts.forget()
        monkeypatch.setattr(where, name, value)
        kernel.trusted()
        assert kernel.compared == 2

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"right": 1}', '{"about": {}}'])
    def test_a_damaged_file(self, text: str, tmp_path: Path) -> None:
        kernel = Kernel(RIGHT)
        kernel.trusted()
        (file,) = tmp_path.rglob("*.json")
        file.write_text(text)
        verdicts.forget()
        assert kernel.trusted()
        assert kernel.compared == 2
        assert json.loads(file.read_text())["right"] is True

    def test_no_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(mhf_compiler.compat, "cache_folder", lambda: None)
        assert Kernel(RIGHT).trusted()
        assert not list(tmp_path.rglob("*"))

    def test_a_folder_that_cannot_be_written(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setattr(mhf_compiler.compat, "cache_folder", lambda: tmp_path / "file")
        assert Kernel(RIGHT).trusted()


class TestNothingIsCompared:
    def check(self, device: torch.device = CARD) -> None:
        kernel = wrong()
        assert kernel.trusted(device=device)
        assert kernel.compared == 0

    def test_in_the_capture_of_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """But at the next call outside of it."""
        with monkeypatch.context() as capture:
            capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            self.check()
        with pytest.warns(RuntimeWarning):
            assert not wrong().trusted()

    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MHF_COMPILER_CHECK_KERNELS", "0")
        self.check()

    def test_under_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verdicts, "interpreted", lambda: True)
        self.check()

    def test_on_a_cpu(self) -> None:
        self.check(torch.device("cpu"))


class TestNoVerdict:
    """The launch itself shows what is wrong; nothing is written down."""

    def check(self, kernel: Kernel, tmp_path: Path) -> None:
        assert kernel.trusted()
        assert kernel.trusted()
        assert kernel.compared == 1
        assert not list(tmp_path.rglob("*.json"))

    def test_a_kernel_that_fails(self, tmp_path: Path) -> None:
        class Failing(Kernel):
            def __call__(self) -> Results | None:
                super().__call__()
                raise torch.OutOfMemoryError

        self.check(Failing(RIGHT), tmp_path)

    def test_a_kernel_that_does_not_take_the_tensors(self, tmp_path: Path) -> None:
        kernel = Kernel(RIGHT)
        kernel.results = None
        self.check(kernel, tmp_path)


def test_a_comparison_is_no_part_of_the_call_that_is_recorded() -> None:
    launched: list[str] = []

    class Compiled:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments: launched.append(self.name)

    class Launching(Kernel):
        def __call__(self) -> Results | None:
            replay.record(Compiled("the comparison's"), 1, [])
            return super().__call__()

    def call() -> None:
        Launching(RIGHT).trusted()
        replay.record(Compiled("the call's"), 1, [])

    replay.recorded(call)()
    assert launched == ["the call's"]


class TestSelection:
    def test_plain_triton_takes_the_place_of_a_family(self) -> None:
        for kernel in ("forward", "dq", "dv", "dk_du"):
            assert select(kernel, ON_HOPPER).family == "hopper"
        refuse("hopper", "dq", ON_HOPPER)
        assert select("dq", ON_HOPPER).family == "plain"
        assert select("dq", ON_HOPPER._replace(tokens=2000, heads=4, groups=4)).family == "plain"
        assert select("dq", ON_HOPPER._replace(head_dim=64)).family == "hopper"
        assert select("dv", ON_HOPPER).family == "hopper"
        refuse_none()
        assert select("dq", ON_HOPPER).family == "hopper"


def make(
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 1024,
    width: int = 8,
    *,
    gated: bool = True,
) -> Problem:
    """Heads that share weights, some stored by columns; Hopper's own kernels take all of it."""
    torch.manual_seed(0)
    scale = (2 * width) ** -0.5
    weights: list[Any] = [torch.randn(2, 2, 16, width).to(dtype) * scale for _ in range(2)]
    down = torch.randn(2, 2, width, 16).to(dtype).transpose(2, 3) / 6
    q, r = torch.randn(1, tokens, 4, width).to(dtype), torch.rand(1, tokens, 4, 2)
    if not gated:
        weights[1] = None
    bias = None if gated else torch.randn(2, 2, 16).to(dtype)
    return Problem(q, *weights, down, r, k_bias=bias)


class Kernels:
    """All kernels of a card, computed by PyTorch; those in `wrong`, by family and name, wrongly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.wrong: set[tuple[str, str]] = set()
        self.ran: list[tuple[str, str]] = []
        self.problems: list[Problem] = []
        for name in ("forward", "dq", "dv", "dk_du"):
            monkeypatch.setattr(dispatch, f"run_{name}", self.kernel("plain", name))
        for name in ("forward", "dq", "dv", "dk_du", "dk_dv"):
            monkeypatch.setattr(hopper, f"run_{name}", self.kernel("hopper", name))
        for name in ("forward", "backward"):
            monkeypatch.setattr(batched, f"run_{name}", self.kernel("batched", name))

    def kernel(self, family: str, name: str) -> Callable[..., bool | None]:
        def run(problem: Problem, *rest: Any) -> bool | None:
            self.ran.append((family, name))
            self.problems.append(problem)
            if name == "forward":
                out, _ = rest
                blocked.forward(problem, out)
                results = [out]
            else:
                grad_out, gradients, _ = rest
                own = [x if of in FILLS[name] else None for of, x in gradients._asdict().items()]
                blocked.backward(problem, grad_out, Gradients(*own))
                results = Gradients(*own).wanted
            if (family, name) in self.wrong:
                results[-1].mul_(1.5)
            return None if family == "plain" else True

        return run


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setattr(verdicts, "_compares", lambda device: True)
    return Kernels(monkeypatch)


def results(problem: Problem) -> list[Tensor]:
    out = torch.full_like(problem.q, float("nan"))
    dispatch.forward(problem, out)
    gradients = problem.new_gradients([x is not None for x in problem.tensors])
    grad_out = torch.ones_like(problem.q)
    dispatch.backward(problem, grad_out, gradients)
    expected = torch.empty_like(out)
    blocked.forward(problem, expected)
    right = problem.new_gradients([x is not None for x in problem.tensors])
    blocked.backward(problem, grad_out, right)
    for found, exact in zip([out, *gradients.wanted], [expected, *right.wanted], strict=True):
        torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)
    return [out, *gradients.wanted]


ORDER = ["forward", "dv", "dk_du", "dq"]
UNGATED = ["forward", "dk_dv", "dq"]


class TestDispatch:
    def test_each_kernel_is_compared_before_its_first_launch(self, kernels: Kernels) -> None:
        state = torch.get_rng_state()
        problem = make()
        torch.set_rng_state(state)
        results(problem)
        assert torch.get_rng_state().equal(state)
        assert kernels.ran == [("hopper", name) for name in ORDER for _ in range(2)]
        for small, large in zip(kernels.problems[::2], kernels.problems[1::2], strict=True):
            assert small.q.shape[1] <= 400
            assert (large.q.shape, small.q.shape[2], small.k.shape[0]) == (problem.q.shape, 2, 1)
            assert small.k.shape[1:] == problem.k.shape[1:]
            assert [x is None or x.dtype for x in small.tensors] == [
                x is None or x.dtype for x in problem.tensors
            ]
            assert small.v.stride(2) == 1
            assert small.constants == problem.constants

    def test_further_calls_compare_nothing(self, kernels: Kernels) -> None:
        results(make())
        kernels.ran.clear()
        results(make())
        results(make(tokens=1040))
        assert kernels.ran == [("hopper", name) for name in ORDER] * 2

    @pytest.mark.parametrize("name", ORDER)
    def test_plain_triton_takes_the_place_of_a_wrong_kernel(
        self, name: str, kernels: Kernels
    ) -> None:
        kernels.wrong.add(("hopper", name))
        with pytest.warns(RuntimeWarning, match=f"the hopper kernel '{name}' does not compute"):
            results(make())
        assert kernels.ran.count(("plain", name)) == 2  # the comparison, and the call
        assert kernels.ran.count(("hopper", name)) == 1
        kernels.ran.clear()
        results(make())
        assert set(kernels.ran) == {("plain" if x == name else "hopper", x) for x in ORDER}

    def test_the_one_kernel_of_dk_and_dv_is_compared(self, kernels: Kernels) -> None:
        problem = make(gated=False, width=128)
        results(problem)
        assert kernels.ran == [("hopper", name) for name in UNGATED for _ in range(2)]
        kernels.ran.clear()
        results(problem)
        assert kernels.ran == [("hopper", name) for name in UNGATED]

    def test_two_of_plain_triton_take_its_place(self, kernels: Kernels) -> None:
        kernels.wrong.add(("hopper", "dk_dv"))
        with pytest.warns(RuntimeWarning, match="the hopper kernel 'dk_dv' does not compute"):
            results(make(gated=False, width=128))
        kernels.ran.clear()
        results(make(gated=False, width=128))
        hoppers = {"forward", "dq"}
        assert kernels.ran == [("hopper" if x in hoppers else "plain", x) for x in ORDER]

    @pytest.mark.parametrize("name", ["k", "v", "k_bias"])
    def test_one_of_its_gradients_alone(self, name: str, kernels: Kernels) -> None:
        problem = make(gated=False)
        gradients = problem.new_gradients([field == name for field in Gradients._fields])
        dispatch.backward(problem, torch.ones_like(problem.q), gradients)
        assert set(kernels.ran) == {("plain", "dv" if name == "v" else "dk_du")}

    @pytest.mark.parametrize("name", ORDER)
    @pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 1024), (torch.float32, 128)])
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_a_wrong_kernel_of_plain_triton_is_an_error(
        self, name: str, dtype: torch.dtype, tokens: int, kernels: Kernels
    ) -> None:
        kernels.wrong |= {("hopper", name), ("plain", name)}
        for _ in range(2):
            with pytest.raises(WrongKernelError, match=f"the kernel '{name}', as Triton"):
                results(make(dtype, tokens))

    @pytest.mark.parametrize("name", ["forward", "backward"])
    def test_plain_triton_takes_the_place_of_wrong_products(
        self, name: str, kernels: Kernels
    ) -> None:
        kernels.wrong.add(("batched", name))
        with pytest.warns(RuntimeWarning, match=f"the batched kernel '{name}' does not compute"):
            results(make(torch.float32))
        instead = {"forward"} if name == "forward" else {"dv", "dk_du", "dq"}
        assert {x for family, x in kernels.ran if family == "plain"} == instead
        (other,) = {"forward", "backward"} - {name}
        assert kernels.ran.count(("batched", other)) == 2  # the comparison, and the call

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_nothing_takes_the_place_of_wrong_products_of_wide_heads(
        self, kernels: Kernels, tmp_path: Path
    ) -> None:
        results(make(tokens=32, width=320))
        assert kernels.ran == [("batched", x) for x in ("forward", "backward") for _ in range(2)]
        verdicts.forget()
        kernels.wrong.add(("batched", "forward"))
        for file in tmp_path.rglob("*.json"):
            file.unlink()
        with pytest.raises(WrongKernelError, match="the kernel 'forward', as Triton"):
            results(make(tokens=32, width=320))
        assert {family for family, _ in kernels.ran} == {"batched"}

    def test_products_in_tf32_are_not_wrong(self, kernels: Kernels) -> None:
        """Whether they are used is PyTorch's setting, of which a verdict knows nothing."""
        run = batched.run_forward

        def rounded(problem: Problem, out: Tensor, tile: object) -> bool:
            run(problem, out, tile)
            out.copy_(out.bfloat16())
            return True

        kernels.monkeypatch.setattr(batched, "run_forward", rounded)
        results(make(torch.float32))
        assert {family for family, _ in kernels.ran} == {"batched"}

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_a_wrong_tuned_tile_gives_way_to_the_shipped_one(
        self, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        problem = make(torch.float32, tokens=128)
        shipped = portable("forward", problem.sizes)
        run = dispatch.run_forward

        def wrong_if_tuned(problem: Problem, out: Tensor, tile: Tile) -> None:
            run(problem, out, tile)
            if tile != shipped:
                out.zero_()

        monkeypatch.setattr(dispatch, "run_forward", wrong_if_tuned)
        monkeypatch.setattr(dispatch.store, "row_for", lambda kernel, problem: (16, 16, 4, 2))
        results(problem)
