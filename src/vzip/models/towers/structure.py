"""Vision towers: where each family keeps its layers, what runs before them, and whether there is a CLS token.

The only file that knows attribute paths inside a tower. A new tower is one more ``_Family`` entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModel, InternVLVisionModel, SiglipVisionModel
from transformers.masking_utils import create_bidirectional_mask

from vzip.compressors.vision import VisionShape
from vzip.errors import PromptError, UnsupportedModelError, nearest


@dataclass(frozen=True)
class _Family:
    """What differs between towers: the class, its ``config.model_type``, CLS, the norm before the first layer.

    ``layers``, ``attention`` and ``norm`` (before attention) are names of parts; ``queries`` and ``keys`` of those that
    make them, in turn; ``unit_side`` is ``TowerGeometry``'s; ``plain_calls``: layers take no mask, and the embeddings
    interpolate without being told.
    """

    model_class: type[nn.Module]
    config_type: str
    has_cls: bool
    pre_norm_name: str | None = None
    layers: str = "layers"
    attention: str = "self_attn"
    norm: str = "layer_norm1"
    queries: tuple[str, ...] = ("q_proj",)
    keys: tuple[str, ...] = ("k_proj",)
    unit_side: int = 1
    plain_calls: bool = False


_FAMILIES = (
    _Family(CLIPVisionModel, "clip_vision_model", has_cls=True, pre_norm_name="pre_layrnorm"),  # spelled so in HF
    _Family(SiglipVisionModel, "siglip_vision_model", has_cls=False),
    _Family(
        InternVLVisionModel,
        "internvl_vision",
        has_cls=True,
        layers="layer",
        attention="attention",
        norm="layernorm_before",
        queries=("q_proj", "q_norm"),  # the norm is the identity where the checkpoint has none
        keys=("k_proj", "k_norm"),
        unit_side=2,
        plain_calls=True,
    ),
)


@dataclass(frozen=True)
class TowerGeometry:
    """A tower's shape, known from its configuration alone.

    Attributes:
        image_size: side of the square input in pixels.
        grid: (rows, cols) of patches.
        has_cls: whether row 0 of the output is CLS.
        num_layers: transformer layers.
        patch_size: side of a patch in pixels.
        unit_side: side in patches of the square that becomes one visual token (2: the pixel shuffle of InternVL, behind
            which there is no CLS any more).
    """

    image_size: int
    grid: tuple[int, int]
    has_cls: bool
    num_layers: int
    patch_size: int
    unit_side: int = 1

    @property
    def num_patches(self) -> int:
        """Patch tokens, without CLS."""
        return self.grid[0] * self.grid[1]

    def shape(self, drop_cls: bool = False) -> VisionShape:
        """Of an image of one crop, CLS being the family's to leave out."""
        rows, cols = (side // self.unit_side for side in self.grid)
        has_cls = self.has_cls and self.unit_side == 1 and not drop_cls
        return VisionShape("image", 1, (rows, cols), has_cls, num_vanilla=rows * cols)

    def num_layers_to_run(self, select_layer: int) -> int:
        """Layers that must run so that ``hidden_states[select_layer]`` exists (index 0 is the input of layer 1).

        Raises:
            UnsupportedModelError: the tower has no such layer.
        """
        if not -(self.num_layers + 1) <= select_layer <= self.num_layers:
            raise UnsupportedModelError(
                f"vision_feature_layer={select_layer}: the vision tower has {self.num_layers} layers, so"
                f" {-(self.num_layers + 1)} to {self.num_layers} are allowed. Change it in the"
                " checkpoint's config.json."
            )
        return select_layer if select_layer >= 0 else self.num_layers + 1 + select_layer


@dataclass(frozen=True)
class Tower:
    """A vision tower taken apart (references into the Hugging Face module; nothing is copied or changed).

    Attributes:
        geometry: its shape.
        embeddings: pixels -> ``[N, L, D]``.
        pre_norm: norm before the first layer, or None.
        layers: the transformer layers, in order.
        num_heads: attention heads of every layer.
        family: what its parts are called.
    """

    geometry: TowerGeometry
    embeddings: nn.Module
    pre_norm: nn.Module | None
    layers: nn.ModuleList
    num_heads: int
    family: _Family = _FAMILIES[0]

    def embed(self, pixel_values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """``[N, 3, h, w]`` -> ``[N, L, D]``, the input of the first layer.

        Args:
            pixel_values: as the tower takes them.
            grid: (rows, cols) of patches that they are resized to, position embeddings interpolated; None: as they are.

        Raises:
            PromptError: pixels of another shape than the tower takes.
        """
        size = self.geometry.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[2:]) != (size, size):
            raise PromptError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: this vision tower takes [crops, 3, {size},"
                f" {size}]. Prepare images with the checkpoint's own processor, or with preprocess_images."
            )
        weight = next(self.embeddings.parameters())
        if weight.device.type != "meta":  # accelerate parks offloaded weights on meta and moves inputs itself
            pixel_values = pixel_values.to(weight.device)
        if grid is None or grid == self.geometry.grid:
            hidden = self.embeddings(pixel_values)
        else:
            settings = {} if self.family.plain_calls else {"interpolate_pos_encoding": True}
            hidden = self.embeddings(self.resize(pixel_values, grid), **settings)
        return hidden if self.pre_norm is None else self.pre_norm(hidden)

    def resize(self, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[N, 3, h, w]`` as so many rows and columns of patches, bicubic and antialiased."""
        height, width = (side * self.geometry.patch_size for side in grid)
        wide = pixel_values.float()
        return functional.interpolate(wide, (height, width), mode="bicubic", antialias=True).to(pixel_values.dtype)

    def run_layer(self, layer_index: int, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """A layer (0-based) on ``[N, L, D]``; ``mask``: what ``mask`` returns."""
        layer = self.layers[layer_index]
        output: Tensor = layer(hidden) if self.family.plain_calls else layer(hidden, mask)
        return output

    def mask(self, hidden: Tensor, shown: Tensor | None) -> Tensor | None:
        """What the layers take as mask where rows are padding; ``shown``: bool ``[N, L]``, None where none is."""
        if shown is None:
            return None
        config: Any = self.layers[0].get_submodule(self.family.attention).config
        mask: Tensor | None = create_bidirectional_mask(config, hidden, shown)
        return mask

    def values_of(self, layer_index: int) -> nn.Module:
        """The value projection of a layer (0-based)."""
        return self.layers[layer_index].get_submodule(f"{self.family.attention}.v_proj")

    def attention_of(self, layer_index: int) -> tuple[nn.Module, nn.Module, float]:
        """What makes a layer's (0-based) queries, what makes its keys, and the product scale."""
        attention = self.layers[layer_index].get_submodule(self.family.attention)
        queries, keys = (attention.get_submodule(names[-1]) for names in (self.family.queries, self.family.keys))
        return queries, keys, float(attention.scale)  # type: ignore[arg-type]

    def projections(self, layer_index: int, hidden: Tensor, num_queries: int | None) -> tuple[Tensor, Tensor | None]:
        """Keys and queries ``[N, L, H * d]`` of a layer (0-based) whose input is ``hidden [N, L, D]``, made apart.

        They are what ``attention_of``'s modules return while the layer runs, for a graph, in which no hook reads it.
        torch does not find them to be the layer's own, so the layer's keys are computed twice there (0.4 % of a tower).

        Args:
            layer_index, hidden: see above.
            num_queries: of how many rows, the first ones, the queries are made; 0: none, and None is returned for
                them; None: of all.
        """
        layer = self.layers[layer_index]
        attention = layer.get_submodule(self.family.attention)
        if (before := getattr(layer, "before_attention", None)) is not None:  # Video-LLaVA's temporal step
            hidden = before(hidden)
        keys = layer.get_submodule(self.family.norm)(hidden)
        queries = None if num_queries == 0 else keys[:, :num_queries]
        for name in self.family.keys:
            keys = attention.get_submodule(name)(keys)
        for name in self.family.queries if queries is not None else ():
            queries = attention.get_submodule(name)(queries)
        return keys, queries


def geometry_from_config(vision_config: Any) -> TowerGeometry:
    """Reads a tower's shape from its Hugging Face configuration, without any weights.

    Raises:
        UnsupportedModelError: no family here has this ``model_type``, or its sizes cannot be.
    """
    for family in _FAMILIES:
        if vision_config.model_type == family.config_type:
            _check_sizes(vision_config)
            size, patch_size = _side(vision_config.image_size), _side(vision_config.patch_size)
            side = size // patch_size
            if side % family.unit_side:
                raise UnsupportedModelError(
                    f"vision_config.image_size={size}, patch_size={patch_size} in the checkpoint's config.json:"
                    f" {side} patches on a side must be a multiple of {family.unit_side}, since"
                    f" {family.unit_side} x {family.unit_side} become one visual token."
                )
            num_layers = vision_config.num_hidden_layers
            return TowerGeometry(size, (side, side), family.has_cls, num_layers, patch_size, family.unit_side)
    names = [family.config_type for family in _FAMILIES]
    raise UnsupportedModelError(
        f"Vision tower of type '{vision_config.model_type}' is not supported"
        f"{nearest(vision_config.model_type, names)}; supported are {', '.join(names)}. A new tower is an entry in"
        " vzip/models/towers/structure.py."
    )


def find_tower(module: nn.Module) -> Tower:
    """Takes a Hugging Face vision tower apart.

    Args:
        module: of a class in ``_FAMILIES``; layers either directly inside or under ``vision_model``.

    Raises:
        UnsupportedModelError: another class.
    """
    if any(isinstance(module, family.model_class) for family in _FAMILIES):
        return Tower(**parts_of(module, module.config))
    names = ", ".join(family.model_class.__name__ for family in _FAMILIES)
    raise UnsupportedModelError(
        f"Vision tower {type(module).__name__} is not supported; supported are {names}. A new tower is an entry in"
        " vzip/models/towers/structure.py."
    )


def parts_of(module: nn.Module, config: Any) -> dict[str, Any]:
    """The fields of ``Tower``, of a module whose parts have Hugging Face's names, though it may not be its own."""
    geometry = geometry_from_config(config)
    family = next(each for each in _FAMILIES if each.config_type == config.model_type)
    children = dict(module.named_children())
    inner = dict(children["vision_model"].named_children()) if "vision_model" in children else children
    layers = inner["encoder"].get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return {
        "geometry": geometry,
        "embeddings": inner["embeddings"],
        "pre_norm": None if family.pre_norm_name is None else inner[family.pre_norm_name],
        "layers": layers,
        "num_heads": config.num_attention_heads,
        "family": family,
    }


def check_select_layer(select_layer: object) -> int:
    """Returns the select layer if it is a single one.

    Raises:
        UnsupportedModelError: a list of layers, whose features would have to be joined before compression.
    """
    if isinstance(select_layer, bool) or not isinstance(select_layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer={select_layer!r}: features joined from several layers are not supported; one layer"
            " (an integer such as -2) is. It is a setting of the checkpoint's config.json."
        )
    return select_layer


def _side(size: Any) -> Any:
    """The side of a square that a configuration gives as a number or as (height, width); anything else as it is."""
    return size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size


def _check_sizes(vision_config: Any) -> None:
    """Raises UnsupportedModelError for a tower whose configuration has sizes that no tower can have."""
    names = ("image_size", "patch_size", "num_hidden_layers", "hidden_size", "num_attention_heads")
    sizes: dict[str, Any] = {name: _side(getattr(vision_config, name, None)) for name in names}
    wrong = [name for name, size in sizes.items() if not isinstance(size, int) or size < 1]
    if not wrong and sizes["patch_size"] > sizes["image_size"]:
        wrong = ["patch_size"]
    if wrong:
        raise UnsupportedModelError(
            f"vision_config.{wrong[0]}={sizes[wrong[0]]!r} in the checkpoint's config.json: must be a whole number, 1"
            " or more, and a patch no larger than the image."
        )
