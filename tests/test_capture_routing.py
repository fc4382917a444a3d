"""Experts whose tokens follow from the data: captured so that the routing stays open."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effuse.backends.reference import session
from effuse.capture import capture
from effuse.capture_routing import Count, Routing, check_routing
from effuse.capture_rows import Memory, Rows, UnsupportedError
from effuse.errors import CaptureError
from effuse.plan import Role
from effuse.program import run_program
from effuse.verify import verify

# pytest's log capture makes torch.export write its trace of every symbol, at ten times the time.
logging.getLogger("torch.__trace").disabled = True

Tensor = torch.Tensor


class Expert(nn.Module):
    """A gated layer, and something to do with its result."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x)))


class Routed(nn.Module):
    """Each token goes to two of five experts, which a layer chooses: sorted, counted and cut."""

    def __init__(
        self, then: Callable[[Tensor], Tensor] = lambda x: x, extra: float = 0, count: int = 2
    ) -> None:
        super().__init__()
        self.choose = nn.Linear(8, 5, bias=False)
        self.experts = nn.ModuleList(Expert(then) for _ in range(5))
        self.extra, self.count = extra, count

    def forward(self, sample: Tensor) -> Tensor:
        x = sample.reshape(-1, 8)
        scores = self.choose(x).softmax(dim=-1)
        weights, chosen = torch.topk(scores, k=self.count, dim=-1)
        if self.count == 1:
            chosen = scores.argmax(dim=-1)
        flat, weights = chosen.view(-1), weights.view(-1, 1)
        order = flat.argsort()
        ends = flat.bincount().cpu().numpy().cumsum(0)
        total = torch.zeros_like(x)
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            tokens = (order // self.count)[start:end]
            result = self.experts[number](x[tokens])
            result.mul_(weights[order[start:end]])
            places = tokens.view(-1, 1).repeat(1, x.shape[-1])
            total.scatter_reduce_(0, places, result, reduce="sum")
            total = total + self.extra
        return sample + total.view_as(sample)


def made(**options: object) -> tuple[nn.Module, Tensor]:
    """A small network of experts, and a latent."""
    torch.manual_seed(0)
    return Routed(**options).eval(), torch.randn(2, 6, 8)  # type: ignore[arg-type]


def others() -> list[Tensor]:
    """Latents whose tokens go elsewhere: mixed, and all to the same two experts."""
    return [torch.randn(2, 6, 8), torch.randn(8).expand(2, 6, 8) + 1e-3 * torch.randn(2, 6, 8)]


def test_routing_is_computed_anew_for_each_latent():
    model, x = made()
    program = capture(model, {"sample": x})
    verify(program)
    assert [item.role for item in program.inputs] == [Role.LATENT]
    ways = set()
    for other in (x, *others()):
        with torch.no_grad():
            ways.add(tuple(model.choose(other.reshape(-1, 8)).argmax(dim=1).tolist()))
            expected = model(other)
        torch.testing.assert_close(run_program(program, {"sample": other})[0], expected,
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
    assert len(ways) == 3
    (run,) = (session(program),)
    assert torch.equal(run(sample=x), run_program(program, {"sample": x})[0])


def test_every_expert_computes_on_each_token_once():
    model, x = made()
    (part,) = capture(model, {"sample": x}).parts
    sizes = [tuple(node.meta["val"].shape) for node in part.graph.nodes
             if node.target is torch.ops.aten.linear.default]  # fmt: skip
    assert sizes == [(12, 5)] + 5 * [(12, 16), (12, 16), (12, 8)]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_added_for_an_empty_expert_as_well_is_found(count: int):
    model, x = made(extra=1.0, count=count)
    x = 9 * torch.cat(3 * [model.choose.weight.detach()])[:12].view(2, 6, 8)  # no expert is empty
    assert model.choose(x.view(-1, 8)).argmax(dim=1).unique().numel() == 5
    with pytest.raises(CaptureError, match="numpy"):
        capture(model, {"sample": x})


@pytest.mark.parametrize("then", [
    lambda x: x.softmax(dim=0), lambda x: x - x.mean(dim=0), lambda x: x.flip(0),
    lambda x: x - x[:1], lambda x: x / x.shape[0], lambda x: x / x.size(0), lambda x: x.cumsum(0),
    lambda x: x + x.sum(), lambda x: torch.cat([2 * x[:6], x[6:]]), lambda x: x[:100],
    lambda x: x.roll(4, 0), lambda x: x if x.is_mps else 2 * x, lambda x: x.T.T,
], ids=["softmax", "mean", "flip", "first", "shape", "size", "cumsum", "sum", "parts", "capacity",
        "roll", "property", "transposed"])  # fmt: skip
def test_experts_that_mix_their_tokens_are_refused(then: Callable[[Tensor], Tensor]):
    model, x = made(then=then)
    model(x)
    with pytest.raises(CaptureError, match="numpy"):
        capture(model, {"sample": x})


@pytest.mark.parametrize("then", [
    lambda x: x.softmax(dim=1), lambda x: x[:, None].mean(dim=1), lambda x: 2 - x,
    lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1), lambda x: x.clamp(max=0.1).to(x.dtype),
    lambda x: x @ torch.eye(8) + x.amax(dim=-1, keepdim=True),
    lambda x: x.view(-1, 2, 4).flatten(1), lambda x: x * (x != 0) + (x == x.clamp(min=0)),
], ids=["softmax", "axis", "from", "cat", "clamp", "matmul", "view", "equal"])  # fmt: skip
def test_experts_may_do_what_they_like_with_one_token(then: Callable[[Tensor], Tensor]):
    model, x = made(then=then)
    program = capture(model, {"sample": x})
    for other in others():
        with torch.no_grad():
            found = run_program(program, {"sample": other})[0]
            torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-6)


class Ways(nn.Module):
    """Each token goes to one of five layers, chosen, counted and summed in one of several ways."""

    def __init__(self, way: str = "", total: str = "plain") -> None:
        super().__init__()
        self.choose = nn.Linear(8, 5, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.way, self.total = getattr(self, way, self.shifted), getattr(self, total)

    def argmax(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=-1)

    def argmin(self, scores: Tensor) -> Tensor:
        return (-scores).argmin(dim=-1)

    def argsort(self, scores: Tensor) -> Tensor:
        return scores.argsort(dim=-1, descending=True)[:, 0]

    def sort(self, scores: Tensor) -> Tensor:
        return scores.sort(dim=-1, descending=True).indices[:, 0]

    def shifted(self, scores: Tensor) -> Tensor:
        """The places plus 1, so that there is a number that the choice cannot give."""
        chosen = scores[:, :4].argmax(dim=-1)
        chosen.view(-1, 1).add_(1)
        return chosen

    def plain(self, base: Tensor, places: Tensor, result: Tensor) -> Tensor:
        return base.scatter_add(0, places, result)

    def greatest(self, base: Tensor, places: Tensor, result: Tensor) -> Tensor:
        return base.scatter_reduce(0, places, result, "amax")

    def forward(self, sample: Tensor) -> Tensor:
        x, used = sample.reshape(-1, 8), 0
        total = x.clone()
        chosen = self.way(self.choose(x))
        order, start = chosen.argsort(), 0
        ends = chosen.bincount(minlength=5).numpy().cumsum(0)
        for expert, end in zip(self.experts, ends, strict=True):
            if start != end:
                tokens, used = order[start:end], used + 1
                places = tokens.view(-1, 1).repeat(1, 8)
                total = self.total(total, places, expert(x[tokens]))
            start = end
        return sample + total.view_as(sample) / (used if self.way != self.argmax else 1)


def full(model: nn.Module) -> Tensor:
    """A latent on which no expert is empty."""
    return 9 * torch.cat(3 * [model.choose.weight.detach()])[:12].view(2, 6, 8)


@pytest.mark.parametrize("way", ["argmin", "argsort", "sort"])
def test_only_choices_that_the_check_can_turn_are_followed(way: str):
    torch.manual_seed(0)
    model = Ways(way).eval()
    with pytest.raises(CaptureError, match="numpy") as refused:
        capture(model, {"sample": full(model)})
    assert "of any size" in str(refused.value.__cause__)


def test_places_that_were_written_into_are_not_counted():
    torch.manual_seed(0)
    model = Ways("shifted").eval()
    with pytest.raises(CaptureError, match="numpy") as refused:
        capture(model, {"sample": torch.randn(2, 6, 8)})
    assert "of any size" in str(refused.value.__cause__)


def test_rows_come_together_in_sums_only():
    torch.manual_seed(0)
    model, x = Ways("argmax").eval(), torch.randn(2, 6, 8)
    program = capture(model, {"sample": x})
    for other in (x, *others()):
        with torch.no_grad():
            found = run_program(program, {"sample": other})[0]
            torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-6)
    greatest = Ways("argmax", "greatest").eval()
    with pytest.raises(CaptureError, match="numpy") as refused:
        capture(greatest, {"sample": full(greatest) + 5})
    assert "is no sum" in str(refused.value.__cause__)


def test_counts_that_were_written_into_are_no_counts_any_more():
    with Routing():
        chosen = torch.randn(6, 3).argmax(dim=1)
        copied = (counts := chosen.bincount(minlength=3)).cpu()
        assert [each.counts() for each in copied.cumsum(0).numpy()] == [True] * 3
        counts.add_(1)
        for read in (counts.numpy, lambda: counts.cumsum(0), copied.numpy):
            with pytest.raises(UnsupportedError, match="written into"):
                read()
        chosen[:2] = 7
        with pytest.raises(UnsupportedError, match="of any size"):
            chosen.view(-1).bincount()


def test_what_fails_where_experts_are_empty_is_told_as_what_failed_first():
    class Needing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Ways("argmax")

        def forward(self, sample: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                places = self.inner.choose(sample.view(-1, 8)).argmax(dim=-1)
                assert places.unique().numel() > 1, "all tokens are with one expert"
            return self.inner(sample)

    torch.manual_seed(0)
    model = Needing().eval()
    with pytest.raises(CaptureError, match="numpy") as refused:
        capture(model, {"sample": full(model.inner)})
    assert isinstance(refused.value.__cause__, AssertionError)


def rows(count: int = 3) -> Rows:
    """Two of some rows."""
    return Rows(torch.ones(count, 2), torch.arange(count) < 2)


def test_of_rows_in_the_same_memory_only_those_that_were_written_are_read_again():
    one = rows()
    assert one.mul_(2.0) is one and one.only().tolist() == [[2, 2], [2, 2], [0, 0]]
    half, copy = one[:, :1], one + 0
    half.add_(1.0)
    assert half.only().flatten().tolist() == [3, 3, 0] and copy.only()[0].tolist() == [2, 2]
    with pytest.raises(UnsupportedError, match="is written into"):
        one.add_(1.0)


@pytest.mark.parametrize("write", [
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow,
])  # fmt: skip
def test_what_is_written_into_rows_is_seen_under_their_other_names(write: Callable[..., object]):
    one = rows()
    write(half := one[:, :1], 2.0)
    expected = torch.ones(3, 2)
    write(expected[:, :1], 2.0)
    assert torch.equal(half.base, expected[:, :1])
    with pytest.raises(UnsupportedError, match="is written into"):
        one.only()


def test_rows_are_compared_number_by_number():
    one = rows()
    assert (one != 1).base.tolist() == [[False, False]] * 3
    assert (one == 1).base.tolist() == [[True, True]] * 3
    with pytest.raises(UnsupportedError, match="are true"):
        assert one == 1


@pytest.mark.parametrize("name", ["is_mps", "is_sparse", "T", "data", "shape"])
def test_properties_of_rows_are_not_told(name: str):
    with pytest.raises(UnsupportedError, match=name):
        getattr(rows(), name)


def test_rows_that_are_cut_of_a_tensor_are_not_written_into():
    cut = Rows(torch.ones(3, 2), torch.arange(3) < 2, memory=Memory(locked=True))
    for write in (lambda: cut.mul_(2.0), lambda: cut[:, 1:].add_(1.0)):
        with pytest.raises(UnsupportedError, match="what rows are cut of"):
            write()
    assert torch.equal((cut * 2).base, torch.full((3, 2), 2.0))


def test_a_table_that_is_written_into_gives_no_rows_any_more():
    one = rows()
    one.base.add_(1)
    with pytest.raises(UnsupportedError, match="is written into"):
        one.only()


def test_rows_chosen_otherwise_do_not_meet():
    with pytest.raises(UnsupportedError, match="chosen otherwise"):
        rows() + rows()


def count(*terms: int) -> Count:
    """A sum of counts, each of which is 1."""
    return Count(torch.tensor(sum(terms)), {(0, place): each for place, each in enumerate(terms)})


def test_counts_are_compared_with_what_they_cannot_be_less_than():
    some, more = count(1, 0), count(1, 1)
    assert some and more > some and some < more and some != more
    assert some > 0 and some != 0 and (more - some).terms == {(0, 1): 1}
    for unknown in (lambda: count(1, 0) == count(0, 1), lambda: some > more, lambda: some == 3,
                    lambda: some < 3, lambda: int(some), lambda: some == some + 0,
                    lambda: range(more)):  # fmt: skip
        with pytest.raises(UnsupportedError):
            unknown()


def test_the_check_compares_where_experts_are_empty():
    model, x = made()
    exported = torch.export.export(Plain(model), (), {"sample": x}, strict=False)
    with pytest.raises(UnsupportedError, match="without tokens"):
        check_routing(model, {"sample": x}, exported)


class Plain(nn.Module):
    """A network's choice, without its experts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor) -> Tensor:
        return sample + self.model.choose(sample).topk(2).values.mean()


def test_the_number_of_tokens_may_be_open():
    model, x = made()
    program = capture(model, {"sample": x}, dynamic={"batch": (2, 8)})
    verify(program)
    for batch in (3, 8):
        other = torch.randn(batch, 6, 8)
        with torch.no_grad():
            found = run_program(program, {"sample": other})[0]
            torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-6)
