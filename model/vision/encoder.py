"""The frozen encoder: images -> patch features, as its `FeatureSpec` specifies.

    encoder = load_encoder(encoder_config("clip-vit-l14-336"))
    images = [encoder.decode(data) for data in files]
    pixels = np.stack([encoder.prepare(image) for image in images])     # (n, S, S, 3) uint8
    features = encoder.encode(pixels)                                    # (n, M, V) float32

Every batch has one fixed shape, so the features of an image do not depend on the rest of the batch.

n images in a call, B images in a batch, S side of the input in pixels, N patches, M tokens after pooling,
V width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image

from cache.format.codec import FP16_MAX
from cache.format.spec import ARRAYS, FeatureSpec
from configs import UserError, build
from model.io.device import DTYPES, native_dtype, pick_device
from model.io.tensors import hash_tensors
from model.media.fit import InputFit, resize_text
from model.media.images import DecodedImage
from model.quantize import occurs
from model.vision.config import EncoderConfig, tower_folder
from model.vision.demo_tower import DemoTower
from model.vision.replay import Replay

if TYPE_CHECKING:
    from model.vision.clip_tower import ClipTower
    from model.vision.hf_tower import HfTower

log = logging.getLogger(__name__)

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of a demo tower's colours, if its entry names none."""
WITH_TAIL = ("CLIPVisionModel", "SiglipVisionModel")
"""Towers of transformers whose blocks `model.tail` computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Built:
    """A tower with its weights in float32 on the CPU, and what the spec says about them."""

    tower: ClipTower | HfTower | DemoTower
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: str
    is_random: bool
    source: str | None = None


class VisionEncoder:
    """A frozen tower on its device. `decode` and `prepare` are thread-safe, `encode` is for one thread."""

    def __init__(self, config: EncoderConfig, built: _Built, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._built = built
        wanted = config.compute_dtype
        self.dtype = native_dtype(device) if wanted == "auto" else DTYPES[wanted]
        self._tower = built.tower.to(device, self.dtype).eval().requires_grad_(False)

        def features(x: torch.Tensor, array: str) -> tuple[torch.Tensor, torch.Tensor]:
            return self.features(x, array)  # looked up when it is called, as tests replace it

        self._replay = {array: Replay(partial(features, array=array)) for array in ARRAYS}
        self.input = InputFit(
            size=built.tower.image_size,
            fit=config.fit,
            mean=built.mean,
            shorter_side=config.shorter_side or built.tower.image_size,
            reduces=config.decode == "reduced",
        )
        self._mean = torch.tensor(built.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(built.std, device=device).view(1, 3, 1, 1)

    @contextlib.contextmanager
    def in_float64(self) -> Iterator[None]:
        """Let a CPU compute in float64 while the block runs. Weights in float32 come back as they were."""
        before, self.dtype = self.dtype, torch.float64
        self._tower.to(self.dtype)
        try:
            yield
        finally:
            self.dtype = before
            self._tower.to(self.dtype)

    def spec(self, codec: str) -> FeatureSpec:
        """Return the spec of this encoder's features, stored with `codec`.

        Raises:
            UserError: the pooling does not divide the tower's grid, or the codec its width.
        """
        return _spec(self.config, self._built, str(self.dtype).removeprefix("torch."), codec)

    def load_info(self) -> dict[str, Any]:
        """Return how to build this encoder again, and the library versions used, as JSON values."""
        return {
            "encoder": dataclasses.asdict(self.config),
            "random_weights": self._built.is_random,
            "weights": self._built.source,
            "device": self.device.type,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        }

    @property
    def tower(self) -> ClipTower | HfTower | DemoTower:
        """The tower with its weights, cut down to the blocks that the features need."""
        return self._built.tower

    @property
    def parameters(self) -> int:
        """Parameters of the whole tower, as published."""
        return self._built.tower.total_parameters

    @property
    def parameters_used(self) -> int:
        """Parameters that the features depend on. The others are not kept."""
        return sum(p.numel() for p in self._tower.parameters())

    def decode(self, data: bytes) -> DecodedImage:
        """Decode an image as the features of a space need it: whole, or reduced.

        Raises:
            BadMediaError: it cannot be decoded.
        """
        return self.input.decode(data)

    def prepare(self, image: Image.Image | DecodedImage) -> npt.NDArray[np.uint8]:
        """Fit an RGB image, or one from `decode`, to the tower's input, (S, S, 3) uint8."""
        return self.input.prepare(image)

    def encode(self, pixels: npt.NDArray[np.uint8], array: str = "image") -> torch.Tensor:
        """Encode (n, S, S, 3) uint8, any n -> features (n, M, V) float32, pooled as for `array`.

        Raises:
            ValueError: `pixels` has another shape or dtype.
        """
        spec = self.spec("fp16")
        side = spec.image_size
        if pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels {pixels.shape} {pixels.dtype}, expected (n, {side}, {side}, 3) uint8"
            )
        done = [torch.empty(0, spec.tokens(array), spec.width, device=self.device)]
        clipped = []
        for start in range(0, len(pixels), spec.batch_size):
            part = pixels[start : start + spec.batch_size]
            batch = np.zeros((spec.batch_size, *pixels.shape[1:]), np.uint8)
            batch[: len(part)] = part
            x, over = self._replay[array](torch.from_numpy(batch).to(self.device))
            done.append(x[: len(part)].clone())  # the next batch overwrites it
            clipped.append(over[: len(part)].sum())
        if clipped and (values := int(torch.stack(clipped).sum())):
            log.warning("%d values beyond float16 were clipped before pooling", values)
        return torch.cat(done)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, array: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode one batch on the device, without waiting for it.

        Args:
            pixels: (B, S, S, 3) uint8, on the encoder's device; B is the batch size.
            array: `image` or `frame`.

        Returns:
            Features (B, M, V) float32, pooled as for `array`; (B,) values clipped before pooling, int64.
        """
        x = self._scale(pixels).to(self.dtype)
        # By default cuDNN computes convolutions of float32 in TF32, which has 10 bits of mantissa.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = torch.cat([block.float() for block in self._tower(x)], dim=-1)
        return _pool(x, self.spec("fp16").pool(array))

    def normalize(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return the input of the tower: (B, S, S, 3) uint8 -> (B, 3, S, S) float32, on the device."""
        return self._scale(torch.from_numpy(pixels).to(self.device))

    def _scale(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the input of the tower, from pixels on the device."""
        # In place: four fresh buffers took 3 ms an image of 336 x 336 on a CPU, one takes 1.1 (2026-11-27).
        x = pixels.permute(0, 3, 1, 2).float().div_(255)
        return x.sub_(self._mean).div_(self._std)


def load_encoder(
    config: EncoderConfig,
    *,
    device: str = "auto",
    random_weights: bool = False,
    weights: str | None = None,
) -> VisionEncoder:
    """Build the encoder of `config` with its weights.

    Args:
        config: an entry of configs/encoders.yaml.
        device: see `pick_device`.
        random_weights: use untrained weights from `config.seed`; the demo tower always does.
        weights: file or folder with the weights; None for the hub.

    Raises:
        UserError: the device cannot be used, or the weights cannot be found, read or loaded, or are given to
            an encoder that loads none.
    """
    config.check_weights(weights, random_weights)
    chosen = pick_device(device)
    if config.library == "demo":
        built = _build_demo(config)
    elif config.library == "transformers":
        built = _build_hf(config, random_weights, weights)
    else:
        built = _build_clip(config, random_weights, weights)
    return VisionEncoder(config, built, chosen)


def rebuild_encoder(
    load: Mapping[str, Any], spec: FeatureSpec, *, device: str = "auto", weights: str | None = None
) -> VisionEncoder:
    """Build the encoder that made a space.

    On another kind of device the precision may differ from the space's. A float32 CPU agrees with float16
    features of a GPU within 0.2 %.

    Args:
        load: the encoder's `load_info`, as space.json records it.
        spec: the spec of the space.
        device: see `pick_device`.
        weights: file or folder with the weights, if they moved since.

    Raises:
        UserError: the device cannot be used, the weights cannot be loaded, or the encoder that was built has
            another spec than the space.
    """
    entry = load.get("encoder")
    if not isinstance(entry, Mapping):
        raise UserError(f"space {spec.name} does not record how its encoder is built")
    target = pick_device(device)
    native = str(native_dtype(target)).removeprefix("torch.")
    dtype = spec.compute_dtype if spec.compute_dtype in ("float32", native) else native
    if dtype != spec.compute_dtype:
        message = "space %s was made in %s; this device computes in %s"
        log.warning(message, spec.name, spec.compute_dtype, dtype)
    config = build(EncoderConfig, {**entry, "compute_dtype": dtype}, "space.json: load: encoder")
    recorded = load.get("weights")
    if weights is None and recorded is not None and Path(recorded).exists():
        weights = recorded
    encoder = load_encoder(
        config, device=str(target), random_weights=bool(load.get("random_weights")), weights=weights
    )
    found, wanted = encoder.spec(spec.codec).to_json(), spec.to_json()
    # Differences in these change no feature, or less than float16 resolves.
    free = ("compute_dtype", "encoder", "container", "tail")
    different = [key for key in wanted if key not in free and found[key] != wanted[key]]
    if different == ["weights"]:
        raise UserError(
            f"space {spec.name} was made with weights {spec.weights[:12]}..., "
            f"{encoder.load_info()['weights'] or 'this encoder'} holds {found['weights'][:12]}...; "
            "give the right ones: --weights PATH"
        )
    if different:
        raise UserError(
            f"space {spec.name} was made by another encoder than the one built here: "
            + ", ".join(f"{key} {wanted[key]} there, {found[key]} here" for key in different)
        )
    return encoder


def _build_demo(config: EncoderConfig) -> _Built:
    assert config.tower is not None
    tower = DemoTower(config.tower, config.blocks, seed=config.seed)
    return _Built(
        tower=tower,
        mean=config.mean or HALF,
        std=config.std or HALF,
        weights=hash_tensors(tower.state_dict()),
        is_random=True,
    )


def _build_clip(config: EncoderConfig, random_weights: bool, weights: str | None) -> _Built:
    # Importing open_clip takes 3 s, which the demo tower does not need.
    from model.vision.activation_check import check_entry
    from model.vision.clip_tower import ClipTower
    from model.vision.weights import fill

    is_demo = config.tower is not None
    tower = ClipTower(
        config.model,
        config.blocks,
        keep_cls=bool(config.tail),
        demo=config if is_demo else None,
    )
    mean, std = (config.mean or HALF, config.std or HALF) if is_demo else check_entry(tower, config)
    random_weights = random_weights or is_demo
    built = _Built(tower=tower, mean=mean, std=std, weights="", is_random=random_weights)
    # Refuses an invalid entry before a gigabyte is downloaded.
    _spec(config, built, "float32", "fp16")
    if random_weights:
        tower.initialize(config.seed)
        source = None
    else:
        source = str(fill(tower, config, weights, (mean, std)))
    return dataclasses.replace(built, weights=hash_tensors(tower.tensors()), source=source)


def _build_hf(config: EncoderConfig, random_weights: bool, weights: str | None) -> _Built:
    # Importing transformers' classes takes seconds, which the demo tower does not need.
    from model.io.tower_config import ANY_SIZE, read_tower_config
    from model.io.tower_folder import open_tower, read_tensors
    from model.vision.hf_tower import HfTower

    place = Path(weights).expanduser() if weights else None
    place = place.parent if place and place.is_file() else place
    folder = tower_folder(str(place or config.model), config.name)
    found = read_tower_config(folder)
    for note in found.notes:
        log.warning("encoder %s: %s", config.name, note)
    if config.activation not in (None, found.activation):
        raise UserError(
            f"encoder {config.name}: activation {config.activation}, but {folder / 'config.json'} says "
            f"{found.activation}; leave it out of the entry, or correct it"
        )
    side = config.image_size or found.image_size
    if side != found.trained_size and found.kind not in ANY_SIZE:
        raise UserError(
            f"encoder {config.name}: image_size {side}, but this {found.class_name} takes images of "
            f"{found.trained_size} only; give the entry image_size: {found.trained_size}"
        )
    mean, std = config.mean or found.mean, config.std or found.std
    if mean is None or std is None:
        raise UserError(
            f"encoder {config.name}: mean and std are unknown, since {folder} has no "
            "preprocessor_config.json; copy it there, or give an entry of nanomolmo2.yaml both"
        )
    if config.tail and found.class_name not in WITH_TAIL:
        raise UserError(
            f"--tail: encoder {config.name} is a {found.class_name}; training computes the blocks of "
            f"{' and '.join(WITH_TAIL)} alone; encode without --block and --tail"
        )
    tower = HfTower(found, config.blocks, side, keep_cls=bool(config.tail))
    built = _Built(tower=tower, mean=mean, std=std, weights="", is_random=random_weights)
    _spec(config, built, "float32", "fp16")  # refuses an invalid entry before weights are read
    if random_weights:
        tensors = tower.random_tensors(config.seed)
    else:
        tensors = read_tensors(open_tower(folder), config.blocks)
    hashed = hash_tensors(tensors)
    tower.load(tensors)
    source = None if random_weights else str(folder)
    return dataclasses.replace(built, weights=hashed, source=source)


def _spec(config: EncoderConfig, built: _Built, compute_dtype: str, codec: str) -> FeatureSpec:
    tower = built.tower
    shorter = config.shorter_side or tower.image_size
    if shorter < tower.image_size:
        raise UserError(
            f"encoder {config.name}: shorter_side {shorter} is less than the {tower.image_size} pixels of "
            "the input"
        )
    prefix = getattr(tower, "prefix_tokens", 0)
    if config.tail and prefix > 1:
        raise UserError(
            f"--tail: encoder {config.name} has {prefix} tokens before its patches, and one, CLS, can be "
            "stored; encode without --block and --tail"
        )
    try:
        spec = FeatureSpec(
            encoder=f"random-{config.space_name}" if built.is_random else config.space_name,
            architecture=tower.architecture,
            weights=built.weights,
            activation=tower.activation,
            blocks=config.blocks,
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            width=tower.width * len(config.blocks),
            fit=config.fit,
            resize=resize_text(config.fit, shorter),
            mean=built.mean,
            std=built.std,
            keep_cls=bool(config.tail) and prefix == 1,
            pool_image=1 if config.tail else config.pool_image,
            pool_frame=1 if config.tail else config.pool_frame,
            compute_dtype=compute_dtype,
            batch_size=config.batch_size,
            codec=codec,
            decode=config.decode,
        )
        spec.row_bytes("image")  # refuses a width the codec cannot divide
    except ValueError as error:
        raise UserError(f"encoder {config.name}: {error}") from None
    return spec


def _pool(x: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Average window x window patches: (B, N, V) -> (B, N / window^2, V) float32.

    Values are rounded to float16 first and summed in a fixed order, so that `cache.convert`, which pools
    stored rows, gives equal bits. Finite values beyond float16 are clipped, as they are when stored; NaN and
    Inf stay. The second result is how many were clipped, (B,) int64.
    """
    clipped = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    if window == 1:
        return x, clipped
    over = (x.abs() > float(FP16_MAX)) & x.isfinite()
    if occurs(over):
        clipped = over.sum((1, 2))
        x = torch.where(over, x.sign() * float(FP16_MAX), x)
    batch, patches, width = x.shape
    side = round(patches**0.5) // window  # windows along one side of the grid
    # (B, N, V) -> (B, side, window, side, window, V)
    blocks = x.half().float().view(batch, side, window, side, window, width)
    total = torch.zeros(batch, side, side, width, device=x.device)
    for row in range(window):
        for column in range(window):
            total += blocks[:, :, row, :, column]
    return total.mul_(1 / window**2).flatten(1, 2), clipped
