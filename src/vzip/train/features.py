"""What the frozen part of a model makes of each image, kept on disk: the visual tokens before the projector.

A file an image, in a folder for each of what decides its content besides the image. Each image is encoded by itself, so
that its file is the same whichever batch, step or process it was met in first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from vzip.compressors.base import CompressedTokens, Compressor
from vzip.compressors.vision import Signal, VisionShape
from vzip.data.collate import KeptImage, TrainingSet
from vzip.errors import ConfigError, ImageError
from vzip.json_files import to_json
from vzip.media.images import load_image
from vzip.models.families import Adapter
from vzip.models.families.finite import check_embeddings
from vzip.models.families.places import VisualTokens
from vzip.models.vlm import CompressedVlm
from vzip.paths import expanded, shown
from vzip.results.files import make_folder, write_json, written_aside

from .settings import TrainSettings

logger = logging.getLogger(__name__)

# To be raised where our code makes other visual tokens of the same image: preprocessing, towers, selection, merging.
FEATURES_VERSION = 1
KEY = "data.cache_features=true"
_PACKAGES = ("vzip", "torch", "torchvision", "transformers", "pillow", "numpy")
_MEASURED = 8  # images by which the size of the rest is estimated
_SPARE = 0.9  # of the free disk, what the features may take: checkpoints need room too
_TOKENS, _PLACES, _META = "tokens", "places", "vzip"


def check_method(compressor: Compressor) -> None:
    """Raises ConfigError for a method whose tokens are not all made before the projector, which trains."""
    name, why = type(compressor).__name__, None
    if compressor.is_vanilla or compressor.scope == "image":
        why = "puts its tokens together from whole images behind the projector"
    elif compressor.space == "projected" or Signal("projected") in compressor.reads():
        why = "works on what the projector makes"
    if why is not None:
        raise ConfigError(
            f"{KEY}: compressor={name} {why}, and the projector changes with each step. Set data.cache_features=false,"
            " or choose a method that selects before the projector, as visionzip."
        )
    _described(compressor, name)


def check_family(adapter: Adapter) -> None:
    """Raises ConfigError for a family whose units are projected before anything is selected."""
    if not adapter.projects_tokens:
        raise ConfigError(
            f"{KEY}: {type(adapter.model).__name__} selects visual tokens behind its projector, which changes with each"
            " step. Set data.cache_features=false; LLaVA's kin and InternVL select before it."
        )


class FeatureCache:
    """The files of one model, one compressor and one way to run them.

    Args:
        root: the folder of all caches.
        vlm: the model, what trains chosen already.
        compressor: whose tokens are kept.
        run: what else decides the numbers: precision, TF32, device; as plain values.
        weights: ``frozen_digest`` of the model.

    Attributes:
        folder: of these files.

    Raises:
        ConfigError: something before the projector trains; a family or a method that needs what the projector makes.
    """

    def __init__(
        self, root: Path, vlm: CompressedVlm, compressor: Compressor, run: Mapping[str, Any], weights: str
    ) -> None:
        check_method(compressor)
        check_family(vlm.adapter)
        if trained := [name for name, value in before_projector(vlm.adapter) if value.requires_grad]:
            raise ConfigError(
                f"{KEY}: {trained[0]} trains ({len(trained)} parameters before the projector do), so what the vision"
                " tower makes of an image changes with each step. Set data.cache_features=false, or leave vision_tower"
                " out of train.parts."
            )
        self._vlm, self._compressor = vlm, compressor
        about = fingerprint(vlm, compressor, run, weights)
        self.folder = root / hashlib.blake2b(to_json(about), digest_size=16).hexdigest()
        make_folder(self.folder)
        write_json(self.folder / "features.json", about)
        blank = vlm.adapter.read_inputs(**vlm.adapter.blank_images(1))
        self._shape_type = type(blank.images[0])

    def look_up(self, source: str | Path | Image.Image, num_images: int) -> KeptImage:
        """An image's features, or what is needed to make them.

        Args:
            source: a file, or an image already open.
            num_images: how many its sample has, since some families show one that is alone otherwise.

        Raises:
            ImageError: it cannot be read.
        """
        name = hashlib.blake2b(_content(source), person=b"image", salt=num_images.to_bytes(8, "big"), digest_size=20)
        path = self.folder / name.hexdigest()[:2] / f"{name.hexdigest()}.safetensors"
        if (content := read_features(path)) is not None:
            shape = self._shape_type(**{k: _tuples(v) for k, v in _about(content)["shape"].items()})
            return KeptImage(path, shape, self._compressor.num_visual_tokens(shape), content)
        inputs = self._vlm.preprocess_images([load_image(source)], [num_images])
        (shape,) = self._vlm.adapter.read_inputs(**inputs).images
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return KeptImage(path, shape, self._compressor.num_visual_tokens(shape), inputs=arrays)

    def measure(self, data: TrainingSet, device: torch.device) -> tuple[int, int]:
        """Encodes a few images, whose files stay, and takes the others to be as large.

        Returns:
            Estimated bytes of the features of all images, and those that are on disk already.
        """
        # Samples about the same images share their files.
        numbers = np.flatnonzero(data.has_images)
        numbers = numbers[np.unique(data.image_groups[numbers], return_index=True)[1]]
        taken = numbers[np.unique(np.linspace(0, len(numbers) - 1, _MEASURED).astype(int))] if len(numbers) else []
        sizes: list[int] = []
        for number in taken:
            sample = data[int(number)]
            try:
                kept = [self.look_up(source, len(sample.images)) for source in sample.images]
            except ImageError:
                continue  # the training says so, or leaves the sample out
            for each in kept:
                made(self._vlm.adapter, each, self._compressor, device)
            sizes.append(sum(each.path.stat().st_size for each in kept))
        # Without the hidden files that other processes are writing, and rename.
        there = sum(path.stat().st_size for path in self.folder.glob("??/[!.]*.safetensors"))
        return (round(sum(sizes) / len(sizes) * len(numbers)) if sizes else 0), there


def open_caches(
    root: Path,
    vlm: CompressedVlm,
    compressors: Sequence[Compressor | None],
    settings: TrainSettings,
    accelerator: Accelerator,
) -> list[FeatureCache]:
    """A training's caches, one for each of its compressors (None: the model's own); before ZeRO takes weights apart.

    Raises:
        ConfigError: as ``FeatureCache``.
    """
    run = how_it_runs(settings.precision, settings.tf32, accelerator.device, accelerator.native_amp)
    weights = frozen_digest(vlm.adapter)
    return [FeatureCache(root, vlm, each or vlm.compressor, run, weights) for each in compressors]


def check_room(root: Path, needed: int, there: int) -> str:
    """What is said of the size before training starts.

    Args:
        root: the folder of all caches, which is there.
        needed: bytes of all images' features.
        there: of these on disk already.

    Raises:
        ConfigError: they do not fit on the disk.
    """
    free, more = shutil.disk_usage(root).free, max(0, needed - there)
    if more > _SPARE * free:
        raise ConfigError(
            f"{KEY}: the features of all images take about {_size(needed)}, of which {_size(there)} are in"
            f" {shown(root)}, and {_size(free)} are free there. Make room (any folder in it may be removed), set"
            " paths.features_dir to a larger disk, or data.cache_features=false."
        )
    return f"features of all images: about {_size(needed)} in {shown(root)}, {_size(there)} of them there already"


def made(adapter: Adapter, kept: KeptImage, compressor: Compressor, device: torch.device) -> CompressedTokens:
    """The features of an image: as they were read, or by the tower, and then they are written.

    Raises:
        RunWriteError: a full disk.
    """
    # Batches are prepared ahead: another one may have brought the same image meanwhile.
    if (content := kept.content or read_features(kept.path)) is not None:
        return _features(content).to(device)
    inputs = {name: torch.from_numpy(value).to(device) for name, value in kept.inputs.items()}
    with torch.no_grad():
        features = adapter.compress_image(adapter.read_inputs(**inputs), compressor)
    check_embeddings(adapter.model, [features.tokens], inputs)
    _write(kept.path, features, kept.shape)
    return features


def visual_tokens(
    adapter: Adapter, images: Sequence[KeptImage], compressor: Compressor, device: torch.device
) -> list[VisualTokens]:
    """Images' features, through the projector and packed, as ``Adapter.encode`` does it with its tower's."""
    of_counts: dict[tuple[int, int], list[int]] = {}
    features = [made(adapter, image, compressor, device) for image in images]
    for number, each in enumerate(features):
        of_counts.setdefault((each.num_tokens, each.source_index.shape[1]), []).append(number)
    found: dict[int, VisualTokens] = {}
    for members in of_counts.values():
        own = [features[number] for number in members]
        joined = CompressedTokens(
            torch.cat([each.tokens for each in own]),
            torch.cat([each.source_index for each in own]),
            torch.empty(0),  # who was merged into whom is of no use any more
            torch.cat([each.places for each in own]),
        )
        shapes = [images[number].shape for number in members]
        found |= zip(members, adapter.projected(joined, shapes, adapter.projector), strict=True)
    return [found[number] for number in range(len(images))]


def read_features(path: Path) -> bytes | None:
    """A file of features, whole; None: not there, or damaged, which is said."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        tensors, about = load(content), _about(content)
        if about["digest"] == _digest([tensors[name] for name in (_TOKENS, _PLACES)]):
            return content
        reason = "its digest is another one"
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning("%s: damaged (%s); it is made again", path, reason)
    return None


def _features(content: bytes) -> CompressedTokens:
    """Of a file that ``read_features`` has found whole; on the CPU."""
    tensors = load(content)
    places = tensors[_PLACES].long()
    return CompressedTokens(tensors[_TOKENS], places[:, : _about(content)["num_kept"]], torch.empty(0), places)


def _about(content: bytes) -> dict[str, Any]:
    """What a file says of its features; ``load`` leaves it out."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][_META])


def _write(path: Path, features: CompressedTokens, shape: VisionShape) -> None:
    tensors = [features.tokens.cpu().contiguous(), features.places.cpu().int().contiguous()]
    about = {
        "num_kept": features.source_index.shape[1],
        "shape": dataclasses.asdict(shape),
        "digest": _digest(tensors),
    }
    make_folder(path.parent)
    # What a crash of the machine leaves of it, its digest tells: nothing waits for the disk.
    with written_aside(path, sync=False) as aside:
        save_file(dict(zip((_TOKENS, _PLACES), tensors, strict=True)), aside, {_META: to_json(about).decode()})


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _content(source: str | Path | Image.Image) -> bytes:
    """What of an image decides its pixels: a file's bytes, or those of an image that is open."""
    if isinstance(source, Image.Image):
        opened = load_image(source)
        return hashlib.blake2b(opened.tobytes(), person=b"pixels", salt=repr(opened.size).encode()[:16]).digest()
    try:
        with expanded(source).open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).digest()
    except (OSError, ValueError):
        load_image(source)  # says better what is wrong
        raise


def before_projector(adapter: Adapter) -> list[tuple[str, Tensor]]:
    """Names and values of all parameters and buffers that come before the projector: towers, mining, a newline."""
    model = adapter.model
    after = [adapter.projector, adapter.language_model, model.get_output_embeddings()]
    others = {id(value) for module in after for value in (*module.parameters(), *module.buffers())}
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, value) for name, value in named if id(value) not in others]


def frozen_digest(adapter: Adapter) -> str:
    """Digest of the weights before the projector; before ZeRO takes them apart."""
    digest = hashlib.blake2b(digest_size=32)
    for name, value in before_projector(adapter):
        own = value.detach().cpu().contiguous()
        digest.update(f"{name} {own.dtype} {tuple(own.shape)} ".encode())
        digest.update(own.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def how_it_runs(precision: str, tf32: bool, device: torch.device, autocast: bool) -> dict[str, Any]:
    """What of a training's settings and machine decides the last bits.

    With ``autocast``, which DeepSpeed goes without, a GPU's tower makes float32 rows of bfloat16 weights.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "precision": precision,
        "autocast": autocast,
        "tf32": tf32,
        "device": device.type,
        "device_name": name,
    }


def fingerprint(vlm: CompressedVlm, compressor: Compressor, run: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Everything that decides an image's features besides the image.

    Of the checkpoint its weights' digest stands for name and revision: the same weights make the same features.
    """
    adapter, processor = vlm.adapter, getattr(vlm.processor, "image_processor", None)
    config = adapter.model.config
    of_others = ("text_config", "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    vision = getattr(config, "vision_config", None)
    return _plain(
        {
            "version": FEATURES_VERSION,
            "packages": {name: _version(name) for name in _PACKAGES},
            "family": type(adapter).__name__,
            "config": {key: value for key, value in config.to_dict().items() if key not in of_others},
            "attention": getattr(vision, "_attn_implementation", None),
            "weights": weights,
            "options": dataclasses.asdict(adapter.options),
            "preprocess": vlm.preprocess,
            "processor": None if processor is None else [type(processor).__name__, processor.to_dict()],
            "compressor": _described(compressor, type(compressor).__name__),
            "run": dict(run),
        }
    )


def _described(value: Any, where: str) -> Any:
    """A method's class, the digest of its source file, and its arguments; of methods and budgets inside it likewise.

    Raises:
        ConfigError: its arguments cannot be told, so two of them could not be told apart.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_described(each, where) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _described(each, f"{where}.{key}") for key, each in value.items()}
    if not dataclasses.is_dataclass(value) or "__dataclass_fields__" not in vars(type(value)):  # not an heir of one
        raise ConfigError(
            f"{KEY}: {where} is a {type(value).__name__}, whose arguments cannot be told, and features of other"
            " arguments would be taken for its own. Make it a dataclass, as vzip's methods are, or set"
            " data.cache_features=false."
        )
    kind = type(value)
    try:
        source = hashlib.blake2b(Path(inspect.getfile(kind)).read_bytes(), digest_size=16).hexdigest()
    except (OSError, TypeError):  # written at a prompt
        source = None
    idle = value.idle if isinstance(value, Compressor) else frozenset[str]()
    names = [f.name for f in dataclasses.fields(value) if f.name not in idle]
    fields = {name: _described(getattr(value, name), f"{where}.{name}") for name in names}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "source": source, **fields}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """As JSON has it, keys in order; what it has not by its text."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
