"""The built-in model before training: a LLaVA of about five million parameters with its tokenizer and processor.

Same classes, image size and patch grid (336 pixels, 24 x 24 patches, CLS token, select layer -2) as LLaVA-1.5, so
that the paper's budgets apply to it unchanged. The language model has rotary positions, as Llama has: with learned
absolute positions the text would move to untrained places when visual tokens go.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WIDTH, NUM_HEADS, NUM_TOWER_LAYERS, NUM_TEXT_LAYERS = 192, 6, 6, 5
VOCABULARY = 640
IMAGE_TOKEN = "<image>"
# LLaVA-1.5's conversation form without its system prompt; answers follow "ASSISTANT:" with one space.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def prompt(question: str) -> str:
    """What the chat template makes of one image and one question, without the tokenizer's `<s>`."""
    return f"USER: {IMAGE_TOKEN}\n{question} ASSISTANT:"


def build_processor(texts: Iterable[str]) -> LlavaProcessor:
    """Trains a byte-level BPE tokenizer on `texts` and wraps it as LLaVA's processor; digits stay single."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_input_names=["input_ids", "attention_mask"],
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def sine_positions(rows: int, width: int, amplitude: float = 0.5) -> torch.Tensor:
    """Sines and cosines of row and column [rows * rows, width]: neighbours start out similar, far patches do not.

    Only an initial value, trained on like the rest. Whether it learns faster than from random positions was not
    compared.
    """
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(rows)[:, None] * frequencies
    waves = amplitude * torch.cat([angles.sin(), angles.cos()], dim=1)  # [rows, width / 2]
    grid = torch.cat([waves[:, None].expand(-1, rows, -1), waves[None].expand(rows, -1, -1)], dim=-1)
    return grid.flatten(0, 1)


def build_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """Initialises the model with random weights, and the tower's positions with sines and cosines."""
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=NUM_TOWER_LAYERS,
            num_attention_heads=NUM_HEADS,
            image_size=336,
            patch_size=14,
            projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=NUM_TEXT_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=2048,
            # 1 / sqrt(WIDTH): with the usual 0.02, made for widths of thousands, attention starts flat. In a trial on a
            # frozen tower the answer loss after 200 steps was 0.26 against 0.41, and only this one had begun to look
            # things up.
            initializer_range=WIDTH**-0.5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = sine_positions(24, WIDTH)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
