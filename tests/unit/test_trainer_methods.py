"""Methods in the trainer: every one takes a step, and contexts, snapshots and rollouts are what their tables say."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import trainer_kit as kit
from trl.generation.vllm_generation import VLLMGeneration

import dopd
from dopd.data.contexts import JUDGEMENTS, rows_for_view, sibling_contexts
from dopd.data.views import PrivilegedTemplate, privileged_prompt
from dopd.errors import ConfigError, ScoringError
from dopd.methods import METHODS
from dopd.step import Request
from dopd.trainer.anchor import AverageAnchor, SnapshotAnchor
from dopd.trainer.engines import VLLMEngine, drawn_answers


def half_right(completion: str, row: dict[str, Any]) -> float:
    """A verifier that untrained models' answers divide."""
    return float(len(completion.split()) % 2)


def rows_with_contrast(count: int = 8) -> list[dict[str, Any]]:
    rows = kit.task_rows(count)
    return [
        row
        | {
            "contrast_context": rows[n - 1]["privileged_context"],
            "partial_context": row["privileged_context"].split()[0],
            "solution": " ".join(row["solution"].split()[: 3 + n % 4]),
        }
        for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step(name: str, tmp_path: Path) -> None:
    made = kit.trainer(
        tmp_path,
        name,
        model=kit.many_ends(kit.student()),
        train_dataset=kit.Dataset.from_list(rows_with_contrast()),
        verifier=half_right,
        num_generations=4,
    )
    before = {key: value.clone() for key, value in made.model.named_parameters()}
    made.train()
    logged = made.state.log_history[0]
    assert all(value == value for key, value in logged.items() if isinstance(value, float)), logged
    moved = any(not torch.equal(before[key], value) for key, value in made.model.named_parameters())
    assert moved == (logged["grad_norm"] > 0)
    alike = (
        "sdpo",
        "rlcsd",
        "grpo",
        "rlsd",
        "oasis",
        "sipo",
        "distilled_rl",
        "conspo",
        "conspo_uniform",
        "diffgate",
        "rg_opd",
        "opsd_contrast",
    )
    if name not in alike:  # these learn nothing from a prompt whose answers are all alike
        assert moved
    labels = {rule.label for rule in made.table.rules}
    assert {key.removeprefix("share/") for key in logged if key.startswith("share/")} == labels


def test_a_method_that_is_not_verified_says_so_and_others_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="dopd"):
        kit.trainer(tmp_path / "a", "vanilla")
        assert "not verified" not in caplog.text
        kit.trainer(tmp_path / "b", "feedback")
    assert "method 'feedback' is not verified against its source: direction, support and decay" in caplog.text
    assert [name for name in METHODS if dopd.table(name).unverified] == ["feedback"]


def test_rewarded_method_without_a_verifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method 'grpo' learns from rewards: pass reward_funcs="):
        kit.trainer(tmp_path, "grpo")


@pytest.mark.parametrize(("method", "steps"), [("grpo", 2), ("vanilla", 2), ("grpo", 1)])
def test_steps_in_which_nothing_is_learned_are_told(
    method: str, steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = kit.trainer(tmp_path, method, verifier=lambda completion, row: 0.0, max_steps=steps)
    with caplog.at_level("WARNING", logger="dopd"):
        made.train()
    idle = [record.message for record in caplog.records if "nothing was learned" in record.message]
    assert len(idle) == (0 if method == "vanilla" else steps)
    assert not idle or ("step 1: the gradient is 0" in idle[0] and "equal rewards" in idle[0])
    assert steps == 1 or not idle or "in 2 of the logged steps" in idle[1]


def test_siblings_are_right_rollouts_of_the_same_prompt_and_never_the_rows_own() -> None:
    completions, scores = ["a", "b", "c", "d", "e", "f"], [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert sibling_contexts(completions, scores, 3, right=True) == ["c", "a", "a", "e", None, "e"]
    assert sibling_contexts(completions, scores, 3, right=False) == ["b", None, "b", "f", "d", "d"]
    assert sibling_contexts(["", " ", "x"], [1.0, 1.0, 0.0], 3, right=True) == [None, None, None]
    drawn = [sibling_contexts([*completions, f"{n}"], [1.0] * 7, 7, right=True, at_random=True) for n in range(99)]
    assert drawn[0] == sibling_contexts([*completions, "0"], [1.0] * 7, 7, right=True, at_random=True)
    assert all(text != own for texts in drawn for text, own in zip(texts, completions, strict=False))
    assert {texts[0] for texts in drawn} > {"b", "c", "d", "e", "f"}
    with pytest.raises(ConfigError, match="need a verifier"):
        sibling_contexts(completions, None, 3, right=True)
    with pytest.raises(ConfigError, match="6 completions, which is not a multiple of num_generations"):
        sibling_contexts(completions, scores, 4, right=True)


def test_contexts_come_from_where_the_table_says() -> None:
    row = {"prompt": "q", "privileged_context": "hint", "contrast_context": "trap", "privileged_images": ["crop.png"]}
    (told,) = rows_for_view("privileged", dopd.table("dopd"), [row])
    assert told == row
    (told,) = rows_for_view("privileged", dopd.table("dopd_no_privilege"), [row])
    assert told["privileged_context"] is None and told["privileged_images"] is None
    (told,) = rows_for_view("contrast", dopd.table("opsd_contrast", hints="column"), [row])
    assert told["privileged_context"] == "trap" and told["privileged_images"] is None
    (told,) = rows_for_view("praise", dopd.table("cal_opd"), [row])
    assert told["privileged_context"] == JUDGEMENTS["praise"]
    (told,) = rows_for_view("partial", dopd.table("ar_opd"), [row | {"partial_context": "hi"}])
    assert told["privileged_context"] == "hi" and told["privileged_images"] is None
    first, second = rows_for_view("privileged", dopd.table("sdpo"), [row, row], ["x", "y"], [1.0, 0.0], 2)
    assert (first["privileged_context"], second["privileged_context"]) == (None, "x")


def test_several_wrong_rollouts_are_one_context_with_their_mean_probability(tmp_path: Path) -> None:
    made = kit.trainer(
        tmp_path,
        "rlcsd",
        model=kit.many_ends(kit.student()),
        verifier=half_right,
        num_generations=4,
        method_options={"siblings": "first", "num_contrast": 2, "ended": False},
    )
    rows = [made.train_dataset[n] for n in range(8)]
    batch = kit.answered(made, rows)
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    texts = [made.prompts.text(row[kept != 0].tolist()) for row, kept in zip(ids, mask, strict=True)]
    scores = [half_right(text, {}) for text in texts]
    first, second = (sibling_contexts(texts, scores, 4, right=False, number=number) for number in (0, 1))
    assert any(first) and any(second) and first != second
    probabilities = []
    for contexts in (first, second):
        shown = [
            row | {"privileged_context": text} for row, text in zip(made.prompts.asked(rows), contexts, strict=True)
        ]
        again = made.step.scorer.score("contrast_student", kit.privileged_view(made, shown), ids, mask)
        has_one = numpy.array([[text is not None] for text in contexts])
        probabilities.append(numpy.exp(again.tokens.logprobs.double().cpu().numpy()) * has_one)
    found = batch["logprobs/contrast_student"].double().cpu().numpy()
    for place in range(8):
        count = (first[place] is not None) + (second[place] is not None)
        if count:
            kept = mask[place].cpu().numpy() != 0
            mean = sum(values[place][kept] for values in probabilities) / count
            numpy.testing.assert_allclose(found[place][kept], numpy.log(mean), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"num_contrast .*some rule reads all of contrast_student"):
        dataclasses.replace(dopd.table("opsd_contrast"), num_contrast=2)
    with pytest.raises(ConfigError, match=r"num_contrast .*got contrast='column'"):
        dataclasses.replace(dopd.table("rlcsd"), contrast="column")


def test_wrong_hints_of_rlcsd_are_rollouts_that_ended_and_no_context_comes_twice() -> None:
    row = {"prompt": "q", "privileged_context": "hint"}
    texts, scores, ended = ["r", "w1", "w2", "w3"], [1.0, 0.0, 0.0, 0.0], [True, True, False, True]
    table = dopd.table("rlcsd")
    options: dict[str, Any] = {"completions": texts, "scores": scores, "num_generations": 4}
    found = [
        [
            one["privileged_context"]
            for one in rows_for_view("contrast", table, [row] * 4, **options, ended=ended, number=n)
        ]
        for n in range(3)
    ]
    assert {found[0][0], found[1][0]} == {"w1", "w3"} and found[2][0] is None
    assert [found[0][1], found[1][1]] == ["w3", None] and {found[0][2], found[1][2]} == {"w1", "w3"}
    cut = rows_for_view("contrast", dopd.table("rlcsd", ended=False), [row] * 4, **options, ended=ended, number=2)
    assert cut[0]["privileged_context"] in {"w1", "w2", "w3"}
    (ours, *_) = rows_for_view("privileged", dopd.table("rlcsd", hints="column"), [row] * 4, **options)
    assert ours["privileged_context"] == "hint"


def test_a_clamp_that_bites_is_logged_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = kit.trainer(tmp_path, "dapd_entangled", max_steps=2, method_options={"clamp": 1e-4})
    with caplog.at_level("WARNING", logger="dopd"):
        made.train()
    shares = [entry["clamped/all"] for entry in made.state.log_history if "clamped/all" in entry]
    assert len(shares) == 2 and all(0.01 < share <= 1.0 for share in shares)
    assert len([record for record in caplog.records if "the clamp of rule 'all' bounds" in record.message]) == 1


def test_the_view_of_p_alone_has_p_and_nothing_of_the_question(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "purified_opsd")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Of what?"},
        {"role": "user", "content": [{"type": "text", "text": "Apples"}, {"type": "image"}]},
    ]
    for prompt in ("How many apples?", turns):
        row = {"prompt": prompt, "images": ["a.png"], "privileged_context": "seven", "privileged_images": None}
        (alone,) = rows_for_view("context_only", made.table, [row])
        shown = str(privileged_prompt(alone, PrivilegedTemplate()))
        assert "seven" in shown and not any(word in shown for word in ("many", "pples", "Of what", "a.png"))
        assert ("Be brief." in shown) == (prompt is turns)
        (missing,) = rows_for_view("context_only", made.table, [row | {"privileged_context": None}])
        assert missing["prompt"] == prompt  # as the privileged view has it then, so that nothing is learned from it


def test_without_privilege_both_policies_read_the_plain_prompt(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "dopd_no_privilege")
    made.model.train()
    rows = [made.train_dataset[n] for n in range(8)]
    batch = kit.answered(made, rows)
    assert not made.table.needs_privileged
    plain = kit.trainer(tmp_path / "plain", "vanilla")
    views = {"plain": batch.batch.view}
    again = kit.scored_again(plain, views, batch)
    torch.testing.assert_close(batch["logprobs/privileged_teacher"], again["logprobs/teacher"])


def test_student_of_privileged_both_answers_the_privileged_prompt(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "privileged_both")
    made.model.train()
    rows = [made.train_dataset[n] for n in range(8)]
    batch = kit.answered(made, rows)
    told = kit.privileged_view(made, rows)
    assert torch.equal(batch["prompt_ids"], told.prompt_ids) and torch.equal(batch["prompt_mask"], told.prompt_mask)


def test_rollouts_grow_with_the_steps(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "fast_opd", method_options={"start": 2, "growth": 3}, max_steps=4)
    made.train()
    lengths = [entry["completions/max_length"] for entry in made.state.log_history if "completions/max_length" in entry]
    assert lengths == [2, 5, 8, 8]


def test_vllm_obeys_the_limit_of_a_request_and_is_asked_for_the_prompts_of_the_view(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path)
    asked: list[Any] = []

    class Engine:  # as TRL's: it asks its own attribute
        max_completion_length, generation_kwargs = 8, None

        def generate(self, prompts: list[list[int]], images: Any, num_generations: int) -> Any:
            asked.append((prompts, images, self.max_completion_length))
            count = len(prompts) * num_generations
            # Of a token the likeliest other one is there too, in front of it.
            among = [[[5, token] for token in (7, eos, 9, 9)]] * count
            return None, [[7, eos, 9, 9]] * count, [[[-0.5, -1.0]] * 4] * count, among

        def sync_weights(self) -> None:
            synced.append(made.state.global_step)

    synced: list[int] = []
    made.vllm_generation, made._last_loaded_step = Engine(), -1
    eos = kit.TOKENIZER.eos_token_id
    prompts = [row["prompt"] for row in kit.uneven_rows(3)]
    request = Request(kit.view_of(made, prompts), prompts, 5, 0)
    engine = VLLMEngine(made)
    assert drawn_answers(engine, request, made.unwrapped_student, made.ending) == ([[7, eos]] * 3, [[-1.0, -1.0]] * 3)
    engine.generate(request)
    assert synced == [0], "once for the answers of a step"
    assert asked.pop() == asked[0]
    assert asked == [(made.prompts.encode(prompts), None, 5)]
    assert made.vllm_generation.max_completion_length == 8
    assert "self.max_completion_length" in inspect.getsource(VLLMGeneration.generate)


def test_an_engine_of_ones_own_draws_the_answers_and_its_mistakes_are_named(tmp_path: Path) -> None:
    requests: list[Request] = []

    class Fixed:
        def __init__(self) -> None:
            self.answer: Any = [11, 12, kit.TOKENIZER.eos_token_id, 13]
            self.left_out = 0

        def generate(self, request: Request) -> list[list[int]]:
            requests.append(request)
            return [self.answer for _ in request.prompts[self.left_out :]]

    engine = Fixed()
    made = kit.trainer(
        tmp_path, "fast_opd", method_options={"start": 3, "growth": 2}, max_steps=2, rollout_engine=engine
    )
    batches = kit.scored(made)
    made.train()
    asked = [(request.step, request.max_new_tokens, len(request.prompts)) for request in requests]
    assert asked == [(0, 3, 2), (0, 3, 8), (1, 5, 8)]  # the first one before training
    for batch in batches:
        assert batch["completion_ids"].tolist() == [engine.answer[:3]] * 8, "nothing stands behind the end"
    for answer, words in (
        ([11] * 9, "gave an answer of 9 tokens, and was asked for 1 to 8"),
        ([], "gave an answer of 0 tokens"),
        ([11, -1], r"gave \[11, -1\] as answer 0, and was asked for a list of 2 lists of token ids below \d+"),
        ([11.0], "as answer 0, and was asked"),
        ("eleven", "as answer 0, and was asked"),
        (None, "as answer 0, and was asked"),
        ([kit.TOKENIZER.vocab_size + 5], "as answer 0, and was asked"),
    ):
        engine.answer = answer
        with pytest.raises(ScoringError, match=words):
            kit.rollout(kit.trainer(tmp_path / "b", rollout_engine=engine))
    engine.answer = [numpy.int64(11), numpy.int32(12)]
    batch = kit.rollout(kit.trainer(tmp_path / "b", rollout_engine=engine))
    assert batch["completion_ids"].tolist() == [[11, 12]] * 8
    engine.left_out = 1
    with pytest.raises(ScoringError, match="gave a list of 1, and was asked for a list of 2 lists"):
        kit.rollout(kit.trainer(tmp_path / "b", rollout_engine=engine))


@pytest.mark.parametrize("strips", [True, False])
def test_an_engine_that_takes_the_ends_off_answers_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, strips: bool
) -> None:
    """Answers without an end score 0: the accuracy, not the model, shows that the engine takes it off."""
    end = kit.TOKENIZER.eos_token_id

    class Fixed:
        answers = ([11, 12], [11, 12, 13])

        def generate(self, request: Request) -> list[list[int]]:
            ends = [] if strips else [end]
            return [[*self.answers[place % 2], *ends] for place in range(len(request.prompts))]

    made = kit.trainer(tmp_path, rollout_engine=Fixed(), max_steps=4, verifier=lambda text, row: 1.0, logging_steps=1)
    made.train()
    accuracies = [line["rollout/accuracy"] for line in made.state.log_history if "rollout/accuracy" in line]
    assert set(accuracies) == {0.0 if strips else 1.0}
    said = [r.message for r in caplog.records if "no answer ends with an end-of-sequence token" in r.message]
    assert [line.partition(":")[0] for line in said] == ([f"step {n}" for n in (0, 1, 2)] if strips else [])
    assert all(f"({end})" in line for line in said)


def test_answers_at_the_limit_are_cut_and_not_stripped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Long:
        def generate(self, request: Request) -> list[list[int]]:
            return [[11] * (request.max_new_tokens - place % 2) for place in range(len(request.prompts))]

    kit.scored(made := kit.trainer(tmp_path, rollout_engine=Long(), max_steps=1))
    made.train()
    assert not [r for r in caplog.records if "no answer ends" in r.message]


def test_what_an_engine_raises_is_said_of_it(tmp_path: Path) -> None:
    class Failing:
        def generate(self, request: Request) -> list[list[int]]:
            raise ZeroDivisionError("no server")

    with pytest.raises(ScoringError, match="the rollout engine raised ZeroDivisionError: no server"):
        kit.rollout(kit.trainer(tmp_path, rollout_engine=Failing()))


def test_snapshot_is_renewed_every_so_many_steps_and_survives_a_checkpoint(tmp_path: Path) -> None:
    student = kit.student()
    anchor = SnapshotAnchor(student, 2)

    def weight() -> float:
        with anchor.scoring_model(student) as model:
            return float(next(iter(model.parameters())).detach().flatten()[0])

    first = next(iter(student.parameters()))
    start = weight()
    seen = []
    for step in range(1, 6):
        first.data.flatten()[0] = float(step)
        anchor.after_step(student)
        seen.append(weight())
        if step == 3:
            anchor.save(tmp_path)
    assert seen == [start, 2.0, 2.0, 4.0, 4.0]
    again = SnapshotAnchor(student, 2)
    again.load(tmp_path)
    first.data.flatten()[0] = 7.0
    again.after_step(student)  # the fourth step: the count goes on where it was
    with again.scoring_model(student) as model:
        assert float(next(iter(model.parameters())).detach().flatten()[0]) == 7.0


def test_moving_average_of_a_half_precision_student_is_not_lost_to_rounding(tmp_path: Path) -> None:
    """With a decay of 0.98 a step moves the average by 2% of the difference, less than bfloat16 shows next to 1."""
    student = kit.student().bfloat16()
    anchor, own = AverageAnchor(student, decay=0.98), next(iter(student.parameters()))
    start = float(own.detach().flatten()[0])
    own.data.flatten()[0] = start + 0.02
    expected = start
    for step in range(60):
        anchor.after_step(student)
        expected += 0.02 * (float(own.detach().flatten()[0]) - expected)
        if step == 30:
            anchor.save(tmp_path)
            anchor.load(tmp_path)
    with anchor.scoring_model(student) as model:
        shown = next(iter(model.parameters()))
        assert shown.dtype == torch.bfloat16
        assert float(shown.detach().flatten()[0]) == pytest.approx(expected, abs=abs(start) * 2**-8 + 1e-4)
        assert abs(float(shown.detach().flatten()[0]) - start) > 0.01
