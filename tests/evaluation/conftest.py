"""A tiny random LLaVA, a stand-in with scripted answers, and local tasks with known answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"

datasets = pytest.importorskip("datasets")
pytest.importorskip("lmms_eval")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IMAGE_SIZE, PATCH = 56, 14  # 16 patches
NUM_PATCHES = (IMAGE_SIZE // PATCH) ** 2


def make_processor() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["USER: is there a dog? ASSISTANT: yes no"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(processor: Any, seed: int = 0) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the tests' data out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def processor() -> Any:
    return make_processor()


@pytest.fixture(scope="session")
def model(processor: Any) -> Any:
    return make_model(processor)


@pytest.fixture
def vlm(model: Any, processor: Any) -> Any:
    import vzip

    return vzip.CompressedVlm(model, vzip.VisionZip(vzip.TokenBudget(5, 2)), processor)


class ScriptedVlm:
    """Answers what a script says, keyed by the question in the prompt; counts tokens as told.

    Ids of a prompt are the number of its texts and of its images; an encoded image is its number in ``shown``.

    ``measured`` overrides the visual tokens an image that it reports, as a faulty wrapper would.
    """

    def __init__(self, processor: Any, script: Callable[[str], str], measured: int | None = None) -> None:
        import vzip

        self.processor = processor
        self.compressor = vzip.VisionZip(vzip.TokenBudget(5, 2))
        self.pruner = self.last_pruned = None
        self.compiled_parts: tuple[str, ...] = ()
        self.preprocess, self.name_or_path, self.revision, self.positions = "hf", "", None, None
        self.adapter = SimpleNamespace(video_token_id=None, tower_cache=None)
        self.adapter.tokens_per_crop = lambda compressor: compressor.budget.num_tokens
        self.script = script
        self.measured = measured
        self.last_num_visual_tokens: list[int] = []
        self.prompts: list[str] = []
        self.written: list[list[str]] = []
        self.shown: list[Image.Image] = []
        self.pictures: list[list[Image.Image]] = []
        self.batches: list[tuple[int, dict[str, Any]]] = []
        self.device = torch.device("cpu")
        self.model = SimpleNamespace(
            name_or_path="scripted", config=SimpleNamespace(), dtype=torch.float32, device=self.device
        )
        self.model.num_parameters = lambda: 0

    def write_prompts(
        self, texts: list[str], num_images: list[int], num_videos: list[int], written: Any
    ) -> dict[str, torch.Tensor]:
        assert not any(num_videos) and written is None
        assert [text.count("<image>") for text in texts] == num_images
        self.written += [texts]
        return {"input_ids": torch.tensor([[len(self.written) - 1, count] for count in num_images])}

    def preprocess_images(self, images: list[Image.Image], num_images: list[int]) -> dict[str, torch.Tensor]:
        self.shown += images
        first = len(self.shown) - len(images)
        return {"pixel_values": torch.arange(first, len(self.shown), dtype=torch.float32)}

    def encode(self, questions: list[str | None], pixel_values: torch.Tensor | None = None) -> Any:
        numbers = [] if pixel_values is None else pixel_values.int().tolist()
        return SimpleNamespace(images=numbers, videos=[], num_bytes=0)

    def visual_bytes(self, pixel_values: torch.Tensor) -> list[int]:
        return [1] * len(pixel_values)

    def expected_num_visual_tokens(self, encoded: Any) -> list[int]:
        return [self.compressor.budget.num_tokens for _ in encoded.images]

    def generate(self, input_ids: torch.Tensor, encoded: Any, **kwargs: Any) -> torch.Tensor:
        texts, numbers = self.written[int(input_ids[0, 0])], iter(encoded.images)
        self.prompts += texts
        self.pictures += [[self.shown[next(numbers)] for _ in range(count)] for count in input_ids[:, 1].tolist()]
        self.batches.append((len(texts), kwargs))
        count = self.compressor.budget.num_tokens if self.measured is None else self.measured
        self.last_num_visual_tokens = [count for _ in encoded.images]
        rows = [self.processor.tokenizer(self.script(text), add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, rows))
        return torch.tensor([row + [self.processor.tokenizer.pad_token_id] * (width - len(row)) for row in rows])


@pytest.fixture
def scripted(processor: Any) -> Callable[..., ScriptedVlm]:
    return lambda script, measured=None: ScriptedVlm(processor, script, measured)


def save_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    features = datasets.Dataset.from_list(rows[:1]).features.copy()
    one = datasets.Image()
    for name in [name for name in rows[0] if name == "image" or re.fullmatch(r"image_\d", name)]:
        features[name] = datasets.Sequence(one) if isinstance(rows[0][name], list) else one
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))


def picture(index: int) -> Image.Image:
    torch.manual_seed(index)
    return Image.fromarray(torch.randint(0, 256, (40 + index, 60, 3), dtype=torch.uint8).numpy())


EXACT = [("what color?", "red"), ("what animal?", "dog"), ("how many?", "3"), ("where?", "on the left")]
YES_NO = [("is there a dog?", "yes"), ("is there a cat?", "no"), ("is it day?", "yes"), ("is it wet?", "no")]


@pytest.fixture(scope="session")
def include_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of lmms-eval tasks: own_exact, own_yesno (parquet), own_text (json, no image)."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, pairs in (("exact", EXACT), ("yesno", YES_NO)):
        rows = [{"id": i, "image": picture(i), "question": q, "answer": a} for i, (q, a) in enumerate(pairs)]
        save_parquet(rows, folder / f"{name}.parquet")
    lines = [json.dumps({"question": q, "answer": a}) for q, a in EXACT]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "utils.py").write_text(
        "def visual(doc):\n    return [doc['image'].convert('RGB')]\n\n\n"
        "def none(doc):\n    return []\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
    )
    common = "output_type: generate_until\ntest_split: test\ndoc_to_text: !function utils.text\ndoc_to_target: answer\n"
    metric = (
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true,"
        " ignore_punctuation: true}\n"
    )
    for name, data, visual, generation in (
        ("exact", "parquet", "visual", "{max_new_tokens: 4, do_sample: false, temperature: 0, top_p: 1.0}"),
        ("yesno", "parquet", "visual", '{max_new_tokens: 3, until: ["."]}'),
        ("text", "json", "none", "{max_new_tokens: 4}"),
    ):
        file = f"{name}.parquet" if data == "parquet" else f"{name}.jsonl"
        (folder / f"own_{name}.yaml").write_text(
            f"task: own_{name}\ndataset_path: {data}\ndataset_kwargs: {{data_files: {{test: {folder / file}}}}}\n"
            f"{common}doc_to_visual: !function utils.{visual}\ngeneration_kwargs: {generation}\n{metric}"
        )
    return folder


@pytest.fixture
def answers() -> dict[str, str]:
    """The right answer to every question of the local tasks."""
    return dict(EXACT + YES_NO)


@pytest.fixture
def write_parquet() -> Callable[[list[dict[str, Any]], Path], None]:
    return save_parquet


@pytest.fixture
def make_image() -> Callable[[int], Image.Image]:
    return picture


@pytest.fixture
def benchmarks(scripted, tmp_path, monkeypatch) -> Any:
    from tests.evaluation.benchmark_kit import Benchmarks

    return Benchmarks(scripted, save_parquet, tmp_path, monkeypatch)
