"""Conversations with images: the streamed run against a plain loop over what the model's own processor makes of a batch."""

from __future__ import annotations

import base64
import copy
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import ExifTags, Image
from tiny_models import Run, assert_same_bits, make_config, streamed_run, token_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.processing_utils import ProcessorMixin

from finetune.data import BatchPlan
from finetune.data.errors import DataError
from finetune.data.image_rows import ImageRows, _rows, parse_conversation
from finetune.data.pictures import Aside, Pictures, open_image
from finetune.memory.errors import UserError
from finetune.methods.first_order import lane_seed

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}IMAGE"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 280, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 258,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16}


def tokenizer(**images: str) -> Any:
    """Bytes, and special tokens. images: attribute -> token."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|pad|>",
        extra_special_tokens=images,
    )  # fmt: skip


def llava() -> tuple[Any, Any, Any]:
    words = tokenizer(image_token="<image>")
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**VISION, patch_size=4),
        image_token_index=words.image_token_id, vision_feature_layer=-2,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    processor = tf.LlavaProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration, config, processor


def gemma3() -> tuple[Any, Any, Any]:
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    config = tf.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16}, vision_config={**VISION, "patch_size": 4}, mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id, image_token_index=words.image_token_id,
    )  # fmt: skip
    images = tf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    template = TEMPLATE.replace("IMAGE", "<start_of_image>")
    return tf.Gemma3ForConditionalGeneration, config, tf.Gemma3Processor(images, words, template, image_seq_length=4)


def qwen(kind: str) -> tuple[Any, Any, Any]:
    words = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", start="<|vision_start|>", end="<|vision_end|>"
    )
    ids = {"image_token_id": words.image_token_id, "video_token_id": words.video_token_id}
    ids |= {"vision_start_token_id": words.start_id, "vision_end_token_id": words.end_id}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    sizes = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
    text = {**TEXT, "rope_parameters": rope}
    if kind == "2":
        model, vision = tf.Qwen2VLForConditionalGeneration, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        config = tf.Qwen2VLConfig(text_config=text, vision_config={**sizes, **vision}, **ids)
    else:
        model, vision = tf.Qwen2_5_VLForConditionalGeneration, {"hidden_size": 32, "out_hidden_size": 32}
        vision |= {"intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
        config = tf.Qwen2_5_VLConfig(text_config=text, vision_config={**sizes, **vision}, **ids)
    images = tf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    kind = tf.Qwen2VLProcessor if kind == "2" else tf.Qwen2_5_VLProcessor
    return model, config, kind(images, words, None, template)


KINDS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "llava": llava, "gemma3": gemma3, "qwen2-vl": lambda: qwen("2"), "qwen2.5-vl": lambda: qwen("2.5"),
}  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch) -> Callable[[str], tuple[Path, Any]]:
    # Qwen's processors want one of videos too, which wants torchvision.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)

    def make(name: str) -> tuple[Path, Any]:
        kind, config, processor = KINDS[name]()
        torch.manual_seed(3)
        base = kind(config).float()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.06)
        base.save_pretrained(tmp_path / name)
        monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
        return tmp_path / name, processor

    return make


def conversations() -> list[dict[str, Any]]:
    """0, 1 or 2 images of unlike sizes in a row, one or two turns."""
    generator, rows = np.random.default_rng(0), []
    for number in range(9):
        pixels = [generator.integers(0, 255, (20 + 3 * number, 33 - 2 * i, 3), dtype=np.uint8) for i in range(number % 3)]
        parts: list[dict[str, Any]] = [{"type": "image", "image": Image.fromarray(one)} for one in pixels]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": f"what {number}"}]}]
        messages.append({"role": "assistant", "content": "a picture"[: 3 + number % 5]})
        if number % 4 == 1:
            messages += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
        rows.append({"messages": messages})
    return rows


def as_parts(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]}
        for m in row["messages"]
    ]


def plain_batch(processor: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the processor makes of whole conversations; labels are between "assistant\\n" and the next turn."""
    batch = dict(
        processor.apply_chat_template(
            [as_parts(row) for row in rows], tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
    )  # fmt: skip
    start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    labels = torch.full_like(batch["input_ids"], -100)
    for line, ids in zip(labels, batch["input_ids"].tolist(), strict=True):
        places = [i for i in range(len(ids)) if ids[i : i + len(start)] == start]
        for place in places:
            first = place + len(start)
            last = ids.index(processor.tokenizer.eos_token_id, first) + 2  # the end of the turn and the line after it
            line[first:last] = torch.tensor(ids[first:last])
    return batch | {"labels": labels}


def plain_run(config: Any, processor: Any, rows: list[dict[str, Any]]) -> tuple[Run, float]:
    """Also the loss of the first three rows at the end."""
    options = config.training
    torch.set_num_threads(config.engine.num_threads)
    model = tf.AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    torch.manual_seed(options.seed)
    model = get_peft_model(model, LoraConfig(**config.lora.peft_arguments())).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.01)
    lengths = np.array([len(plain_batch(processor, [row])["input_ids"][0]) for row in rows])
    plan = BatchPlan(
        len(rows), options.batch_size, options.micro_batch_size, options.seed, lengths, steps=2, packing=None
    )
    losses = []
    for step in range(2):
        batches = [plain_batch(processor, [rows[i] for row in group for i in row]) for group in plan.step(step)]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = torch.zeros(())
        for index, batch in enumerate(batches):
            labels = batch.pop("labels")
            torch.manual_seed(lane_seed(options.seed, step, index))
            loss = token_loss(model(**batch).logits, labels) / count
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    batch = plain_batch(processor, rows[:3])
    labels = batch.pop("labels")
    with torch.no_grad():
        measured = token_loss(model.eval()(**batch).logits, labels) / int((labels[:, 1:] != -100).sum())
    run = Run(losses, {name: value.detach().clone().contiguous() for name, value in state.items()})
    return run, measured.item()


@pytest.mark.parametrize(
    "name, device", [("llava", "simulated"), ("gemma3", "cpu"), ("qwen2-vl", "cpu"), ("qwen2.5-vl", "cpu")]
)
def test_gives_the_bits_of_a_plain_loop(name, device, model, tmp_path):
    """LoRA on both towers; micro-batches of 2 and 1 rows; LLaVA's second step is in a resumed run, which measures too."""
    folder, processor = model(name)
    rows, targets = conversations(), ["q_proj", "v_proj", "qkv"][: 3 if "qwen" in name else 2]
    training = {
        "batch_size": 3, "micro_batch_size": 2, "learning_rate": 0.02, "lr_scheduler": "constant", "warmup_steps": 0,
        "max_grad_norm": None,
    }  # fmt: skip

    def config(steps: int, **more: Any) -> Any:
        return make_config(
            folder, rows, tmp_path / "out", device=device, lora={"target_modules": targets}, engine={"resident_blocks": 1},
            dataset={"sequence_length": 256}, training={**training, "max_steps": steps}, eval_data=rows[:3], **more,
        )  # fmt: skip

    begun = streamed_run(config(1)) if name == "llava" else None
    found = streamed_run(config(2, resume=begun is not None))
    expected, measured = plain_run(config(2), processor, rows)
    assert begun is None or begun.losses == found.losses[:1]
    assert_same_bits(found, expected)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluation"]["loss"] == pytest.approx(measured, rel=1e-6)


def row_of(*parts: Any, **more: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "yes"}
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}, answer], **more}


WRONG = {
    "no image": (row_of({"type": "image"}), 'expected an image in the part .* or in the column "images", found none'),
    "too many": (row_of({"type": "image"}, images=["a.png", "b.png"]), "as many parts .* as there are images .2., found 1"),
    "video": (row_of({"type": "video", "path": "a.mp4"}), 'expected parts of type "text" and "image", found \'video\''),
    "sound": (row_of(audio="a.wav"), 'found "audio", which is not taken beside images'),
    "weight": ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, 'has "weight", which is not taken beside images'),
    "nothing": ({"messages": [{"role": "user", "content": []}]}, "content is empty"),
    "no conversation": ({"text": "a"}, 'expected a conversation under "messages"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_are_refused_by_name(case):
    row, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        parse_conversation(row, "data[0]")


def test_an_image_is_a_file_bytes_or_a_url_of_its_data(tmp_path, monkeypatch):
    pixels = Image.fromarray(np.random.default_rng(1).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    pixels.save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(whole).decode()}"
    path = str(tmp_path / "a.png")
    for image in (path, whole, url, {"bytes": whole, "path": None}, {"path": path}, pixels):
        assert open_image(image, "data[0]").tobytes() == pixels.tobytes()
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    for image, message in {
        "https://example.com/a.png": "not fetched from a network",
        str(tmp_path / "b.png"): "an image can't be read: .*No such file",
        str(tmp_path / "a.eps"): "an image can't be read",
        whole[:60]: "an image can't be read",
        "data:image/png;base64,?": "an image can't be read",
    }.items():
        with pytest.raises(DataError, match=message):
            open_image(image, "data[0]")
    turned = pixels.getexif()
    turned[ExifTags.Base.Orientation] = 6
    pixels.save(tmp_path / "turned.png", exif=turned)
    for image in (str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        assert open_image(image, "data[0]").tobytes() == pixels.rotate(-90, expand=True).tobytes()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="need the package Pillow"):
        open_image(whole, "data[0]")


def test_long_rows_are_left_out_and_templates_that_lose_text_refused(model, tmp_path):
    _, processor = model("llava")
    rows = [(f"data[{i}]", row) for i, row in enumerate(conversations())]
    found = ImageRows(rows, processor, 60, None, Pictures(tmp_path))
    assert found.left_out > 0 and found.lengths.max() <= 60
    assert f"{found.left_out} left out" in found.describe()[0]
    with pytest.raises(DataError, match="no conversation is left of 9"):
        ImageRows(rows, processor, 3, None, Pictures(tmp_path))
    with pytest.raises(DataError, match="leaves out the text 'what 0'"):
        ImageRows(rows, processor, 256, "{% for m in messages %}{{ m.role }}{% endfor %}", Pictures(tmp_path))


def encoded(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["gemma3", "qwen2-vl"])
def test_a_micro_batch_is_planned_that_no_other_exceeds(name, model, tmp_path):
    """The longest rows have no image."""
    _, processor = model(name)
    rows = conversations()
    rows[3]["messages"][1]["content"] = "long " * 30
    found = ImageRows([("data", row) for row in rows], processor, 512, None, Pictures(tmp_path))
    for count in (1, 2):
        planned = found.largest(count)
        batches = [found.collate(pair) for pair in itertools.combinations(range(len(rows)), count)]
        assert planned.keys() == set().union(*batches)
        for key, value in planned.items():
            assert value.numel() == max(batch[key].numel() for batch in batches if key in batch), key
        assert planned["labels"].shape == planned["input_ids"].shape
    assert "attention_mask" in planned and not planned["attention_mask"].all()


def test_images_are_on_disk_until_their_row_is_computed(model, tmp_path):
    """In whatever way rows have them: the same samples, the same digest, and nothing left in the directory."""
    _, processor = model("llava")
    (folder := tmp_path / "out").mkdir()
    of_pillow = [row for row in conversations() if len(row["messages"][0]["content"]) > 1]
    ways: dict[str, Any] = {"objects": of_pillow}
    for way in ("path", "bytes", "base64"):
        ways[way] = copy.deepcopy(of_pillow)
        for i, part in enumerate(part for row in ways[way] for part in row["messages"][0]["content"] if "image" in part):
            data = encoded(part.pop("image"))
            (tmp_path / f"{i}.png").write_bytes(data)
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            part[way] = {"path": str(tmp_path / f"{i}.png"), "bytes": data, "base64": url}[way]
    columns = {"messages": [], "images": []}
    for row in of_pillow:
        parts = [{"type": part["type"], "text": part.get("text")} for part in row["messages"][0]["content"]]
        turns = [{"role": "user", "content": parts}]
        answer = [{"type": "text", "text": one["content"]} for one in row["messages"][1:]]
        turns += [{"role": one["role"], "content": [text]} for one, text in zip(row["messages"][1:], answer, strict=True)]
        columns["messages"].append(turns)
        columns["images"].append([part["image"] for part in row["messages"][0]["content"] if "image" in part])
    ways["a data set"] = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    digests = set()
    for way, rows in ways.items():
        found = ImageRows(_rows(rows), processor, 256, None, Pictures(folder / "not there yet"))
        assert all(isinstance(one, str if way == "path" else Aside) for images in found._images for one in images), way
        expected = plain_batch(processor, [of_pillow[2], of_pillow[0]])
        for key, value in found.collate([2, 0]).items():
            assert value.equal(expected[key]), (way, key)
        digests.add(found.digest)
    assert len(digests) == 1 and not list(folder.iterdir())
