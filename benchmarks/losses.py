"""Loss terms, forward and backward, against loops over instances and whole matrices of pairs."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench import Bench
from benchmarks.scenes import OFFSETS, bare_step, blobs, embeddings
from gdlib.distill import Distiller, build_term
from gdlib.distill.bank import MemoryBank
from gdlib.types import Batch, Embedding

CHANNELS, INSTANCES, MEMORY = 16, 25, 12
# pixels are averaged before images are compared, as in the original: a matrix of all pixel pairs
# fits nowhere
POOL = 7

# name, term, weight, options; the paper's whole method
TERMS = {
    "supervised": ("supervised", 1.0, {}),
    "agd": ("agd", 1.0, {"balanced": True}),
    "agd inter": ("original", 1.0, {"part": "affinities", "memory": True, "pool": POOL}),
    "igd nodes": ("igd", 0.1, {"part": "nodes"}),
    "igd edges": ("igd", 1.0, {"part": "edges"}),
    "igd inter": ("igd", 1.0, {"memory": True, "part": "edges"}),
}
PARTS = {
    "affinities (supervised and AGD)": ("supervised", "agd"),
    "AGD between images": ("agd inter",),
    "IGD within images": ("igd nodes", "igd edges"),
    "IGD between images": ("igd inter",),
    "all terms": tuple(TERMS),
}


class Scene:
    """Embeddings of student and teacher on a batch, and what the teacher said about the images in
    memory.
    """

    def __init__(
        self, shape: Sequence[int], batch: int = 2, instances: int = INSTANCES, memory: int = MEMORY
    ) -> None:
        self.offsets = OFFSETS[len(shape)]
        labels = [
            torch.from_numpy(blobs(shape, instances, seed).astype("int64")) for seed in range(2)
        ]
        self.label = torch.stack([labels[k % 2] for k in range(batch)])
        self.teacher = embeddings(self.label.numpy(), CHANNELS, 0.3, seed=1)
        self.student = embeddings(self.label.numpy(), CHANNELS, 0.5, seed=2)
        self.memory = [
            (embeddings(labels[k % 2][None].numpy(), CHANNELS, 0.3, seed=10 + k)[0], labels[k % 2])
            for k in range(memory)
        ]

    def to(self, device: torch.device) -> "Scene":
        """Move everything."""
        self.label, self.teacher, self.student = (
            x.to(device) for x in (self.label, self.teacher, self.student)
        )
        self.memory = [(image.to(device), label.to(device)) for image, label in self.memory]
        return self


# --- The plain implementation ---


def shifted(x: Tensor, offset: Sequence[int]) -> Tensor:
    """Return an array whose element p is that at p + offset; it wraps around."""
    return x.roll([-d for d in offset], tuple(range(x.ndim - len(offset), x.ndim)))


def wraps(shape: Sequence[int], offset: Sequence[int], device: torch.device) -> Tensor:
    """Where p + offset is inside the image."""
    out = torch.ones(*shape, dtype=torch.bool, device=device)
    for axis, (n, d) in enumerate(zip(shape, offset, strict=True)):
        position = torch.arange(n, device=device) + d
        good = (position >= 0) & (position < n)
        out &= good.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return out


def targets(label: Tensor, offsets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Affinity targets, masks and class weights (B, K, [Z,] Y, X), one offset after the other."""
    target = torch.stack([label == shifted(label, o) for o in offsets], 1)
    mask = torch.stack([wraps(label.shape[1:], o, label.device) for o in offsets])
    weight = torch.zeros(target.shape, device=label.device)
    for b in range(len(label)):
        f = (target[b][mask].sum() / mask.sum()).clamp(0.05, 0.99)
        positive, negative = (1.0, f / (1 - f)) if f > 0.5 else ((1 - f) / f, 1.0)
        weight[b][target[b]] = positive
        weight[b][~target[b]] = negative
    return target, mask, weight * mask


def affinities(embedding: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
    """Cosine of each pixel with the one at every offset."""
    unit = F.normalize(embedding, dim=1)
    return torch.stack([(unit * shifted(unit, o)).sum(1) for o in offsets], 1)


def nodes(embedding: Tensor, label: Tensor) -> Tensor:
    """Mean vectors (N, D) of the instances of one image, one after the other."""
    return torch.stack([embedding[:, label == i].mean(1) for i in label.unique() if i > 0])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Matrix of the cosines of all pairs."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def pooled(embedding: Tensor) -> Tensor:
    """Unit vectors (B, D, n), averaged over windows."""
    unit = F.normalize(embedding, dim=1)
    if unit.ndim == 4:
        return F.avg_pool2d(unit, POOL, ceil_mode=True).flatten(2)
    return F.avg_pool3d(unit, (3, POOL, POOL), ceil_mode=True).flatten(2)


def reference(scene: Scene, student: Tensor, names: Sequence[str]) -> Tensor:
    """The weighted sum of some terms, as the paper writes them."""
    batch, pixels = len(student), scene.label[0].numel()
    total = student.new_zeros(())
    parts = {name: TERMS[name][1] for name in names}
    if {"supervised", "agd"} & set(parts):
        target, mask, weight = targets(scene.label, scene.offsets)
        weight = weight.to(student.dtype)
        affinity = affinities(student, scene.offsets)
    if "supervised" in parts:
        total = total + parts["supervised"] * (
            weight * (affinity - target.to(affinity.dtype)) ** 2
        ).sum() / (batch * pixels)
    if "agd" in parts:
        teacher = affinities(scene.teacher, scene.offsets)
        total = total + parts["agd"] * (weight * mask * (affinity - teacher) ** 2).sum() / (
            batch * pixels
        )
    if {"igd nodes", "igd edges", "igd inter"} & set(parts):
        graphs = [
            (nodes(s, y), nodes(t, y))
            for s, t, y in zip(student, scene.teacher, scene.label, strict=True)
        ]
    for name, weigh in parts.items():
        if name == "igd nodes":
            loss = sum(((v - w) ** 2).sum(1).mean() for v, w in graphs) / batch
        elif name == "igd edges":
            loss = sum(((cosines(v, v) - cosines(w, w)) ** 2).mean() for v, w in graphs) / batch
        elif name == "igd inter":
            others = [nodes(image, label) for image, label in scene.memory]
            loss = sum(
                ((cosines(v, m) - cosines(w, m)) ** 2).mean() for v, w in graphs for m in others
            )
            loss = loss / (batch * len(others))
        elif name == "agd inter":
            student_pooled, teacher_pooled = pooled(student), pooled(scene.teacher)
            others = [pooled(image[None])[0] for image, _ in scene.memory]
            loss = sum(
                ((m.T @ s - m.T @ t) ** 2).mean()
                for s, t in zip(student_pooled, teacher_pooled, strict=True)
                for m in others
            ) / (batch * len(others))
        else:
            continue
        total = total + weigh * loss
    return total


# --- Ours ---


class Fixed(nn.Module):
    """In place of a network: its output is a parameter."""

    halo = divisor = remainder = margin = None

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.ndim = embedding.ndim - 2
        self.margin, self.levels = (0,) * self.ndim, {}
        layout = torch.channels_last if self.ndim == 2 else torch.channels_last_3d
        # as networks return it
        self.embedding = nn.Parameter(embedding.contiguous(memory_format=layout))

    def forward(self, image: Tensor) -> Embedding:
        """Return the parameter."""
        return Embedding(self.embedding, self.embedding[:, :1], {})


class Ours:
    """The terms as they are trained with: through the distiller and its memory bank."""

    def __init__(
        self, scene: Scene, names: Sequence[str], capacity: int | None = None, **changes: object
    ) -> None:
        terms = []
        for name in names:
            term, weight, options = TERMS[name]
            options = dict(options) | (changes if name == "agd inter" else {})
            memory = options.pop("memory", False)
            terms.append((name, weight, build_term(term, memory, options)))
        self.student = Fixed(scene.student)
        device, count = scene.label.device, len(scene.memory)
        bank = MemoryBank(capacity=capacity or count, sample_size=count) if count else None
        teacher = Fixed(scene.teacher)
        self.distiller = Distiller(self.student, teacher, terms, scene.offsets, bank).to(device)
        self.batch = self._batch(scene.label, 0)
        if self.distiller.bank is not None:
            for k, (image, label) in enumerate(scene.memory):
                self._show(image[None], label[None], 1000 + k)
        self.bank = (
            None if self.distiller.bank is None else copy.deepcopy(self.distiller.bank.state_dict())
        )

    @staticmethod
    def _batch(label: Tensor, first: int, teacher: Embedding | None = None) -> Batch:
        image = torch.zeros(len(label), 1, *label.shape[1:], device=label.device)
        return Batch(
            image,
            label,
            torch.arange(first, first + len(label), device=label.device),
            None,
            teacher,
        )

    @torch.no_grad()
    def _show(self, image: Tensor, label: Tensor, number: int) -> None:
        """Put an image into memory, as a step on it does."""
        kept, self.student.embedding = self.student.embedding, nn.Parameter(image)
        self.distiller(self._batch(label, number, Embedding(image, image[:, :1], {})), 0)
        self.student.embedding = kept

    def prepare(self) -> None:
        """Bring back the memory before the step."""
        if self.bank is not None:
            self.distiller.bank.load_state_dict(self.bank)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return loss and gradient."""
        self.student.embedding.grad = None
        total, _ = self.distiller(self.batch, 0)
        total.backward()
        return total.detach(), self.student.embedding.grad

    @property
    def bank_bytes(self) -> int:
        """What the memory bank takes."""
        return sum(record.nbytes for record in self.distiller.bank.records.values())


def plain(scene: Scene, names: Sequence[str]):
    """Return a call of the plain implementation with the result of `Ours`."""
    student = scene.student.clone().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        student.grad = None
        total = reference(scene, student, names)
        total.backward()
        return total.detach(), student.grad

    return call


def differ(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Larger of the relative differences of loss and gradient."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def run(bench: Bench) -> None:
    """All parts and all together, in 2D and 3D, and what share of a training step they take."""
    shapes = {
        "2D": bench.pick((544, 544), (256, 256), (48, 48)),
        "3D": bench.pick((16, 128, 128), (8, 64, 64), (6, 32, 32)),
    }
    for axes, shape in shapes.items():
        scene = Scene(shape, memory=bench.pick(MEMORY, MEMORY, 3)).to(bench.device)
        about = (
            "roll and sum for every offset, a loop over instances, matrices of all pairs of "
            "pooled pixels"
        )
        for title, names in PARTS.items():
            ours = Ours(scene, names)
            found = bench.compare(
                f"{title}, {axes}",
                ours,
                plain(scene, names),
                prepare=ours.prepare,
                differ=differ,
                tolerance=1e-3,
                least=2,
                about=about,
                shape=list(scene.student.shape),
            )
        ratio = found["ratio"]
        found["ratio_all_terms"] = ratio
        bench.extra["ratio_all_terms" if axes == "2D" else "ratio_all_terms_3d"] = ratio
        del ours
        unpooled = Ours(scene, tuple(TERMS), pool=1)
        full = bench.compare(
            f"all terms, no pooling, {axes}",
            unpooled,
            prepare=unpooled.prepare,
            about="the paper's formula: all pairs of pixels of two images, a matrix "
            "that fits nowhere",
        )
        step = bare_step(bench, len(shape), (len(scene.label), 1, *shape))
        bare = bench.compare(
            f"student's step without losses, {axes}", step, about="forward, backward and optimizer"
        )
        floor = _floor(bench, scene, axes) + (
            f"; all terms without pooling, as by default, take {full['ms']:.0f} ms"
        )
        bench.target(
            f"all terms against the plain implementation, {axes}",
            ratio,
            60,
            at_least=True,
            unit=" x",
            floor=floor,
        )
        share = 100 * full["ms"] / bare["ms"]
        bench.target(
            f"all terms against the student's own step, {axes}", share, 15, unit=" %", floor=floor
        )
        half = Scene([n // 2 for n in shape], memory=len(scene.memory)).to(bench.device)
        bank = [Ours(s, ("agd inter", "igd inter")).bank_bytes for s in (scene, half)]
        bench.extra[f"bank_bytes_{axes.lower()}"] = bank[0]
        bench.target(
            f"memory bank of twice the side against once, {axes}", bank[0] / bank[1], 1, unit=" x"
        )


def _floor(bench: Bench, scene: Scene, axes: str) -> str:
    """Say how long one reading of both embeddings and one writing of the gradient takes."""
    student, teacher = scene.student.clone(), scene.teacher
    gradient = torch.empty_like(student)
    least = bench.compare(
        f"reading both embeddings and writing a gradient once, {axes}",
        lambda: torch.sub(student, teacher, out=gradient),
        about="the least that any loss of both maps can take",
    )
    return f"reading both embeddings and writing the gradient once takes {least['ms']:.1f} ms here"
