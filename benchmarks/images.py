"""Prompts with images: what it saves to encode each image once, and to run each prompt once, for all its rollouts.

One untrained Qwen3-VL model reads prompts with an image each, several rollouts behind each prompt, on three routes that
give the same states: pixels of every row through the vision tower (as when each completion is a sequence of its own),
each different image once, and each different image and prompt once. `scoring` has no gradient; `scoring, known` comes
after another view of the same images with the same weights, whose features are kept (x and x+p of the student, after
its rollouts); `training` is forward and backward. Reported are medians of processor time over interleaved repeats, and
the largest difference of states from the first route.

Examples:
    python benchmarks/images.py
    python benchmarks/images.py --side 448 --rollouts 8 --csv benchmarks/results/images_cpu.csv
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import append_csv, machine, print_table
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from dopd.prefix import hidden_states_sharing_prompts
from dopd.scoring import View, view_hidden_states
from dopd.vision.media import FeatureCache, ImageSet

PATCH, MERGE, CHANNELS = 16, 2, 3 * 2  # three colours, two equal frames
START, END, IMAGE, VIDEO = 0, 1, 2, 3
YARDSTICK = "pixels of every row"


def build(options: argparse.Namespace) -> Any:
    half = options.head // 2
    third = half // 3
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": options.vocab,
            "hidden_size": options.hidden,
            "intermediate_size": 3 * options.hidden,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.hidden // options.head,
            "num_key_value_heads": options.hidden // options.head,
            "head_dim": options.head,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * third, third, third],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": options.vision_layers,
            "hidden_size": options.vision_hidden,
            "intermediate_size": 4 * options.vision_hidden,
            "num_heads": options.vision_hidden // 32,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": options.hidden,
            "num_position_embeddings": (options.side // PATCH) ** 2,
            "deepstack_visual_indexes": [options.vision_layers // 2],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config).to(options.device).eval()


def batch(options: argparse.Namespace) -> tuple[View, Tensor]:
    """A view of prompts, each an image and some words, repeated for its rollouts; and the rollouts' tokens."""
    side = options.side // PATCH
    tokens = (side // MERGE) ** 2
    prompts, sets = [], []
    for number in range(options.prompts):
        words = torch.randint(4, options.vocab, (options.prompt_tokens,))
        prompts.append(torch.cat([torch.tensor([START]), torch.full((tokens,), IMAGE), torch.tensor([END]), words]))
        pixels = torch.randn(side * side, CHANNELS * PATCH * PATCH)
        sets.append(
            ImageSet((str(number),), {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])})
        )
    ids = torch.stack(prompts).repeat_interleave(options.rollouts, 0).to(options.device)
    images = tuple(sets[row // options.rollouts] for row in range(len(ids)))
    view = View(ids, torch.ones_like(ids), images, {"mm_token_type_ids": (ids == IMAGE).long()})
    return view, torch.randint(4, options.vocab, (len(ids), options.completion_tokens), device=options.device)


def routes(model: Any, view: View, ids: Tensor, features: FeatureCache) -> dict[str, Callable[..., Tensor]]:
    rest = (model, view, ids, torch.ones_like(ids))
    return {
        YARDSTICK: lambda cache: view_hidden_states(*rest, as_features=False),
        "images once": lambda cache: view_hidden_states(*rest, cache=cache),
        "images and prompts once": lambda cache: hidden_states_sharing_prompts(*rest, cache=cache),
    }


def scoring(model: Any, route: Callable[..., Tensor], cache: FeatureCache | None) -> Tensor:
    with torch.no_grad():
        return route(cache)


def training(model: Any, route: Callable[..., Tensor], cache: FeatureCache | None) -> Tensor:
    hidden = route(None)
    hidden.square().mean().backward()
    model.zero_grad(set_to_none=True)
    return hidden.detach()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = build(options)
    view, ids = batch(options)
    features = FeatureCache()
    ways = routes(model, view, ids, features)
    scoring(model, ways["images once"], features)  # what the view before has left
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    states: dict[tuple[str, str], Tensor] = {}
    passes = (("scoring", scoring, None), ("scoring, known", scoring, features), ("training", training, None))
    for repeat in tqdm(range(options.repeats + 1), desc="rounds"):
        for phase, run, cache in passes:
            for name, route in ways.items():
                start = clock()
                states[phase, name] = run(model, route, cache)
                if options.device == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first round warms up
                    seconds[phase, name].append(clock() - start)
    rows = []
    for phase, _, _ in passes:
        base = statistics.median(seconds[phase, YARDSTICK])
        for name in ways:
            value = statistics.median(seconds[phase, name])
            difference = (states[phase, name] - states[phase, YARDSTICK]).abs().max().item()
            spread = max(seconds[phase, name]) - min(seconds[phase, name])
            rows.append(
                {
                    "phase": phase,
                    "route": name,
                    "seconds": f"{value:.3f}",
                    "spread": f"{spread:.3f}",
                    "times faster": f"{base / value:.2f}",
                    "largest difference": f"{difference:.1e}",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("side", 224),
        ("prompts", 2),
        ("rollouts", 4),
        ("prompt-tokens", 64),
        ("completion-tokens", 64),
        ("vocab", 4096),
        ("hidden", 256),
        ("head", 64),
        ("layers", 6),
        ("vision-hidden", 256),
        ("vision-layers", 6),
        ("repeats", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine(options.device, options.threads)
    rows = measure(options)
    print_table(rows, list(rows[0]))
    if options.csv:
        asked = {key: value for key, value in vars(options).items() if key not in ("csv", "device", "threads")}
        append_csv(options.csv, [{**row, **asked, **about} for row in rows])


if __name__ == "__main__":
    main()
