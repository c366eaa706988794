"""Trees of draft tokens: structure, derived masks and paths, and how to choose them."""

import operator
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ._checks import check_tensor, debug_enabled

MAX_NODES = 512


class TokenTree:
    """A tree of draft tokens, or one tree a request; node 0 is the root.

    Nodes are topologically sorted: `parents[i] < i`, and `parents[0] == -1`. With a batch of trees each field below
    has a leading batch dimension. Fields describe all `T` nodes; operators skip node `i` of request `b` where
    `i >= num_nodes[b]`.

    parents:     [T] or [B, T] int32, -1 at the root
    num_nodes:   [B] int32, nodes of each request that are real (0: a padded request), or None: all `T`
    max_depth:   int, a bound on the depth, known on the host: it sizes paths; deeper nodes are never accepted
    """

    def __init__(self, parents: Tensor, num_nodes: Tensor | None, max_depth: int, ranks: Tensor | None = None):
        self.parents, self.num_nodes, self.max_depth = parents, num_nodes, max_depth
        if ranks is not None:
            self.ranks = ranks

    # ---- construction ----

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]], device: torch.device | str | None = None) -> "TokenTree":
        """The tree of Medusa's list of paths: `[[0], [0, 0], [1], ...]`, each entry a rank among a head's top-k.

        Nodes are sorted by (length, path), as Medusa's `generate_medusa_buffers` does; the root is added.
        Raises ValueError for an empty list, an empty, negative or duplicate path, and a path whose prefix is missing;
        TypeError for what is not a list of lists of integers.
        """
        try:
            paths = sorted((tuple(operator.index(r) for r in path) for path in choices), key=lambda p: (len(p), p))
        except TypeError as error:
            raise TypeError(f"choices: expected a list of paths of integers: {error}") from None
        if not paths:
            raise ValueError("choices: expected at least one path, got an empty list")
        _check_size("choices", len(paths) + 1)
        index: dict[tuple[int, ...], int] = {(): 0}
        for i, path in enumerate(paths, start=1):
            if not path or min(path) < 0:
                raise ValueError(f"choices: expected non-empty paths of ranks >= 0, got {list(path)}")
            if path in index:
                raise ValueError(f"choices: path {list(path)} is there twice")
            if path[:-1] not in index:
                raise ValueError(f"choices: path {list(path)} needs its prefix {list(path[:-1])}, which is missing")
            index[path] = i
        parents = torch.tensor([-1] + [index[p[:-1]] for p in paths], dtype=torch.int32)
        ranks = torch.tensor([0] + [p[-1] for p in paths], dtype=torch.int32)
        tree = cls(parents, None, len(paths[-1]), ranks)
        return tree if device is None else tree.to(device)

    @classmethod
    def from_parents(
        cls, parents: Tensor, num_nodes: Tensor | None = None, max_depth: int | None = None
    ) -> "TokenTree":
        """The tree with these parent pointers, or one tree a request, built on the tensor's device without a sync.

        parents:    [T] or [B, T] int32 or int64; -1 at the root, else `0 <= parents[i] < i`; padding nodes: anything
        num_nodes:  [B] int32, or None
        max_depth:  a bound on the depth, which sizes `paths` and acceptance's outputs; None: found for a tree on the
                    CPU, T - 1 on a GPU, where finding it would stall: give it there if you know it

        Raises ValueError for a tree that is not topologically sorted. On a GPU that is checked only with
        MEDUSA_KERNELS_DEBUG=1; otherwise such a pointer is clamped to the nearest legal one.
        """
        check_tensor("parents", parents, dtype=(torch.int32, torch.int64))
        if parents.dim() not in (1, 2) or parents.numel() == 0:
            raise ValueError(f"parents: expected shape [T] or [B, T], not empty, got {tuple(parents.shape)}")
        size = parents.shape[-1]
        _check_size("parents", size)
        if num_nodes is not None:
            batch = parents.shape[0] if parents.dim() == 2 else None
            check_tensor("num_nodes", num_nodes, shape=(batch,), dtype=torch.int32, device=parents.device)
        if max_depth is not None and not 0 <= max_depth < size:
            raise ValueError(f"max_depth: expected 0..{size - 1}, got {max_depth}")
        real = cls(parents, num_nodes, 0)._real
        node = torch.arange(size, device=parents.device)
        legal = torch.minimum(parents.long(), node - 1).clamp(min=0)
        legal = torch.where(node == 0, -1, torch.where(real, legal, 0))
        if _values_are_checked(parents):
            wrong = (real & (parents != legal)).nonzero()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                got = f"got {int(parents[at])} at {list(at)}"
                raise ValueError(f"parents: expected -1 at node 0 and 0 <= parents[i] < i elsewhere, {got}")
        tree = cls(legal.int(), num_nodes, size - 1 if max_depth is None else max_depth)
        if max_depth is None and parents.device.type == "cpu":
            tree.max_depth = int(torch.where(tree._real, tree.depths, 0).max())
        return tree

    @classmethod
    def chain(cls, k: int, device: torch.device | str | None = None) -> "TokenTree":
        """The root and a chain of `k` draft tokens."""
        if not 0 <= k < MAX_NODES:
            raise ValueError(f"k: expected 0..{MAX_NODES - 1}, got {k}")
        parents = torch.arange(-1, k, dtype=torch.int32)
        return cls(parents, None, k, torch.zeros_like(parents)).to(device or "cpu")

    @classmethod
    def full(cls, widths: Sequence[int], device: torch.device | str | None = None) -> "TokenTree":
        """The tree in which every node of depth `d` has `widths[d]` children."""
        if not widths or min(widths) < 1:
            raise ValueError(f"widths: expected at least one, each >= 1, got {list(widths)}")
        paths: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for width in widths:
            _check_size("widths", 1 + len(paths) + len(level) * width)
            level = [p + (r,) for p in level for r in range(width)]
            paths += level
        return cls.from_choices(paths, device)

    @classmethod
    def preset(cls, name: str, device: torch.device | str | None = None) -> "TokenTree":
        """A sparse tree that Medusa published, by its name there (`mc_sim_7b_63`, `vicuna_7b_stage2`, ...)."""
        from ._presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"name: expected one of {sorted(PRESETS)}, got {name!r}")
        return cls.from_choices(PRESETS[name], device)

    @classmethod
    def best_first(cls, head_probs: Tensor, num_nodes: int) -> "TokenTree":
        """For each request the tree of its most probable paths under independent heads, built on the device.

        head_probs:  [B, heads, K] floating point in 0..1; probability of the rank-k token of each head
        num_nodes:   nodes of every tree, root included

        A path's score is the product of its probabilities, so that a prefix never scores less than the path: the best
        `num_nodes - 1` paths are a tree, and the optimal one (Medusa section 2.3.3, per step instead of offline).
        Nodes stand in order of score: the first `n` of them are the best tree of `n` nodes (`with_num_nodes`).
        Raises ValueError for more nodes than there are paths. A probability outside 0..1 raises ValueError on the CPU
        (on a GPU with MEDUSA_KERNELS_DEBUG=1) and is clamped otherwise.
        """
        check_tensor("head_probs", head_probs, shape=(None, None, None))
        if not head_probs.is_floating_point():
            raise ValueError(f"head_probs: expected a floating-point dtype, got {head_probs.dtype}")
        batch, heads, top_k = head_probs.shape
        _check_size("num_nodes", num_nodes)
        widths: list[int] = []  # of each level: what of it can be among the best
        for _ in range(heads):
            widths.append(min((widths[-1] if widths else 1) * top_k, max(num_nodes - 1, 0)))
        if not 1 <= num_nodes <= sum(widths) + 1:
            most = 1 + sum(top_k**depth for depth in range(1, heads + 1))
            raise ValueError(f"num_nodes: expected 1..{most} with {heads} heads of {top_k}, got {num_nodes}")
        if _values_are_checked(head_probs) and not bool(((head_probs >= 0) & (head_probs <= 1)).all()):
            raise ValueError("head_probs: expected probabilities, got values outside 0..1")
        device, draft = head_probs.device, num_nodes - 1
        root = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        if not draft:
            return cls(root.int() - 1, None, 0)
        # Level by level its best paths; `above` is a path's prefix, by its place in the row of all levels' paths.
        probs = head_probs.float().nan_to_num(0.0).clamp(0.0, 1.0)
        score, start = probs.new_ones(batch, 1), -1
        scores, above, ranks = [], [], []
        for head, width in enumerate(widths):
            flat = (score.unsqueeze(-1) * probs[:, head].unsqueeze(1)).flatten(1)
            score, pick = flat.sort(dim=1, descending=True, stable=True)
            score, pick = score[:, :width], pick[:, :width]
            scores.append(score)
            above.append(start + pick // top_k)
            ranks.append(pick % top_k)
            start = sum(widths[:head])
        # Of all levels together the best. The stable sort puts a prefix before a path of equal score.
        order = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True).indices[:, :draft]
        place = torch.arange(1, num_nodes, device=device).expand(batch, draft)
        node = torch.zeros(batch, sum(widths), dtype=torch.int64, device=device).scatter_(1, order, place)
        up = torch.cat(above, 1).gather(1, order)
        up = torch.where(up < 0, 0, node.gather(1, up.clamp(min=0)))
        parents = torch.cat([root - 1, up], 1)
        rank = torch.cat([root, torch.cat(ranks, 1).gather(1, order)], 1)
        return cls(parents.int(), None, min(heads, draft), rank.int())

    @classmethod
    def search(cls, head_accuracies: Tensor, num_nodes: int) -> "TokenTree":
        """Medusa's offline sparse-tree search: the tree of `num_nodes` nodes with the most expected accepted tokens.

        head_accuracies: [heads, K] in 0..1; how often the rank-k token of each head was right on a calibration set

        Nodes stand in the order in which the search adds them. Source: Medusa section 2.3.3 and its
        `gen_results.py`.
        """
        check_tensor("head_accuracies", head_accuracies, shape=(None, None))
        trees = cls.best_first(head_accuracies.unsqueeze(0), num_nodes)
        tree = cls(trees.parents[0], None, trees.max_depth, trees.ranks[0])
        return cls(tree.parents, None, int(tree.depths.max()), tree.ranks)

    @classmethod
    def best_size(cls, head_accuracies: Tensor, step_us: Mapping[int, float]) -> int:
        """How many nodes give the most tokens in a µs: the key of `step_us` for which `search`'s tree does.

        head_accuracies:  as for `search`
        step_us:          measured time of a decoding step, in any unit, by the tree's nodes; root included, so that 1
                          is plain decoding. Of one card, model, batch and context length: `benchmarks/step.py` measures

        The larger a tree, the less each more node is likely to be accepted, and the more it costs once the card's
        matmuls are no longer bound by reading weights: the best size falls with the batch.
        """
        if not step_us or not all(us > 0 for us in step_us.values()):
            raise ValueError(f"step_us: expected a positive time for at least one size, got {dict(step_us)}")
        if min(step_us) < 1:
            raise ValueError(f"step_us: expected sizes of at least 1 node, got {min(step_us)}")
        tokens = cls.search(head_accuracies, max(step_us)).expected_tokens(head_accuracies)
        return max(step_us, key=lambda size: float(tokens[size - 1]) / step_us[size])

    # ---- derived ----

    @property
    def size(self) -> int:
        """`T`: nodes of a tree, root and padding included."""
        return self.parents.shape[-1]

    @property
    def batched(self) -> bool:
        """Whether each request has a tree of its own."""
        return self.parents.dim() == 2

    @property
    def device(self) -> torch.device:
        return self.parents.device

    @cached_property
    def packed_mask(self) -> Tensor:
        """[..., T, ceil(T / 64)] int64: bit `j % 64` of word `j // 64` says whether the row attends to node `j`."""
        node = torch.arange(self.size, device=self.device)
        word = torch.arange((self.size + 63) // 64, device=self.device)
        bit = torch.ones_like(node) << (node % 64)
        packed = torch.where(word == (node // 64).unsqueeze(-1), bit.unsqueeze(-1), 0)
        packed = packed.expand(*self.parents.shape, -1).contiguous()
        # Pointer doubling: after step n a row holds its node's nearest 2 ** n on the way up, and `up` is the next one.
        up = self.parents.long().clamp(min=0)
        for _ in range((self.size - 1).bit_length()):
            packed = packed | packed.gather(-2, up.unsqueeze(-1).expand_as(packed))
            up = up.gather(-1, up)
        return packed

    @cached_property
    def mask(self) -> Tensor:
        """[..., T, T] bool: row attends to column, that is, to itself and its ancestors."""
        bits = self.packed_mask.unsqueeze(-1) >> torch.arange(64, device=self.device)
        return (bits & 1).bool().flatten(-2)[..., : self.size].contiguous()

    @cached_property
    def depths(self) -> Tensor:
        """[..., T] int32: edges from the root; a node's position is `cache_seqlens + depth`."""
        return (self.mask.sum(-1) - 1).int()

    @cached_property
    def ranks(self) -> Tensor:
        """[..., T] int32: rank among the head's top-k; for a tree from parent pointers the place among siblings."""
        same = self.parents.unsqueeze(-1) == self.parents.unsqueeze(-2)
        return same.tril(-1).sum(-1).int()

    @cached_property
    def paths(self) -> Tensor:
        """[P, max_depth + 1] int32, -1 padded: root-to-leaf paths in order of their leaf (Medusa's `retrieve_indices`,
        up to the order of rows). With a batch of trees [B, T, max_depth + 1]: row `i` is the path to node `i`, all -1
        where `i` is not a leaf."""
        # Of the nodes that a row attends to, each goes to the column of its depth, and all others to one that is cut.
        columns = self.max_depth + 1
        depth = self.depths.long().clamp(max=columns).unsqueeze(-2)
        node = torch.arange(self.size, device=self.device).expand_as(self.mask)
        rows = torch.full((*self.parents.shape, columns + 1), -1, dtype=torch.int64, device=self.device)
        rows = rows.scatter_(-1, torch.where(self.mask, depth, columns), node)[..., :columns].int()
        real = self._real
        inner = torch.zeros(*self.parents.shape[:-1], self.size + 1, dtype=torch.bool, device=self.device)
        inner.scatter_(-1, torch.where(real & (self.parents >= 0), self.parents, self.size).long(), True)
        leaf = real & ~inner[..., : self.size]
        return torch.where(leaf.unsqueeze(-1), rows, -1) if self.batched else rows[leaf]

    @property
    def _real(self) -> Tensor:
        """[..., T] bool: node is not padding. A tree shared by the batch has none: `num_nodes` only cuts it short."""
        if self.num_nodes is None or not self.batched:
            return torch.ones_like(self.parents, dtype=torch.bool)
        return torch.arange(self.size, device=self.device) < self.num_nodes.unsqueeze(-1)

    @cached_property
    def _max_rank(self) -> int | None:
        return int(torch.where(self._real, self.ranks, 0).max()) if self.device.type == "cpu" else None

    def with_num_nodes(self, num_nodes: Tensor) -> "TokenTree":
        """This tree cut to its first `num_nodes[b]` nodes for request `b`: `[B]` int32; 0 makes a padded request."""
        batch = self.parents.shape[0] if self.batched else None
        check_tensor("num_nodes", num_nodes, shape=(batch,), dtype=torch.int32, device=self.device)
        other = TokenTree(self.parents, num_nodes, self.max_depth)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("num_nodes", "paths", "_max_rank")})
        return other

    def to(self, device: torch.device | str) -> "TokenTree":
        """This tree on `device`, with what attention and acceptance read derived beforehand."""
        _ = self.depths, self.ranks, self.mask, self.packed_mask, self.paths, self._max_rank
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items() if v is not None}
        other = TokenTree(moved["parents"], None, self.max_depth)
        other.__dict__.update(moved)
        return other

    # ---- use ----

    def expected_tokens(self, head_accuracies: Tensor) -> Tensor:
        """[T] float64: the tokens that a step gains on average with the first `i + 1` nodes, if heads are right
        independently of each other (Medusa section 2.3.3): 1, and for each node the product of accuracies on its path.

        head_accuracies:  [heads, K], as for `search`; it must cover the tree's depths and ranks
        """
        check_tensor("head_accuracies", head_accuracies, shape=(None, None))
        if self.batched:
            raise ValueError(f"expected_tokens: expected one tree, got {self}")
        heads, top_k = head_accuracies.shape
        depths, ranks = self.depths.tolist(), self.ranks.tolist()
        if max(depths) > heads or max(ranks) >= top_k:
            raise ValueError(
                f"head_accuracies: expected at least {max(depths)} heads and ranks up to {max(ranks)}, "
                f"got shape {tuple(head_accuracies.shape)}"
            )
        accuracies = head_accuracies.tolist()
        right = [1.0]
        for parent, depth, rank in zip(self.parents.tolist()[1:], depths[1:], ranks[1:]):
            right.append(right[parent] * accuracies[depth - 1][rank])
        return torch.tensor(right, dtype=torch.float64).cumsum(0)

    def candidates(self, root_tokens: Tensor, head_topk: Tensor) -> Tensor:
        """The tree's tokens: the root's, and for a node of depth `d` and rank `r` the rank-`r` token of head `d - 1`.

        root_tokens:  [B] int64;  head_topk: [B, heads, K] int64, each head's top-k tokens, best first
        Returns tokens [B, T] int64.
        Source: Medusa's `generate_candidates`. A shape that the tree outgrows raises ValueError, except on a GPU with
        one tree a request, where ranks are clamped to K - 1, as reading them would stall.
        """
        check_tensor("root_tokens", root_tokens, shape=(None,), dtype=torch.int64, device=self.device)
        batch = root_tokens.shape[0]
        check_tensor("head_topk", head_topk, shape=(batch, None, None), dtype=torch.int64, device=self.device)
        if self.size == 1:
            return root_tokens.unsqueeze(1).clone()
        heads, top_k = head_topk.shape[1:]
        if heads < self.max_depth or top_k < 1:
            raise ValueError(f"head_topk: expected at least {self.max_depth} heads, got shape {tuple(head_topk.shape)}")
        if self._max_rank is not None and self._max_rank >= top_k:
            raise ValueError(f"head_topk: expected a top-{self._max_rank + 1}, got shape {tuple(head_topk.shape)}")
        at = (self.depths.long() - 1).clamp(0, heads - 1) * top_k + self.ranks.long().clamp(max=top_k - 1)
        tokens = head_topk.flatten(1).gather(1, at.expand(batch, self.size))
        return torch.cat([root_tokens.unsqueeze(1), tokens[:, 1:]], 1)

    def __repr__(self) -> str:
        each = f"{self.parents.shape[0]} x " if self.batched else ""
        return f"TokenTree({each}{self.size} nodes, max_depth={self.max_depth}, device={self.device})"


def _check_size(name: str, size: int) -> None:
    if size > MAX_NODES:
        raise ValueError(f"{name}: a tree has at most {MAX_NODES} nodes, root included, got {size}")


def _values_are_checked(x: Tensor) -> bool:
    return x.device.type == "cpu" or debug_enabled()
