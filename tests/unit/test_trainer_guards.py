"""Runs that cannot work are refused before they start, with the reason; oddities are told."""

from pathlib import Path
from typing import Any

import pytest
import text_kit
import torch
import trainer_kit as kit
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoConfig, HfArgumentParser, PhimoeConfig, PhimoeForCausalLM
from trl import TrlParser

from dopd import assignment
from dopd.errors import ConfigError, DataError, ModelError, ScoringError
from dopd.step.liveness import check_alive
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDConfig, guards
from dopd.trainer.context import max_prompt_tokens

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("dopd"))


# --- Models


def test_vocabularies_of_different_sizes_are_refused_and_not_padded(tmp_path: Path) -> None:
    other = build_model(kit.TEACHER, build_tokenizer(["a", "b"]), 1)
    with pytest.raises(ModelError, match=r"vocabulary has 63 tokens, the teacher's 5.*the student's tokenizer"):
        kit.trainer(tmp_path, teacher_model=other)


def test_teacher_and_student_as_one_object_are_refused(tmp_path: Path) -> None:
    model = kit.student()
    with pytest.raises(ConfigError, match="same object"):
        kit.trainer(tmp_path, model=model, teacher_model=model)


@pytest.mark.parametrize("method", ["vanilla", "dopd"])
def test_one_path_given_for_both_is_refused(tmp_path: Path, method: str) -> None:
    path = str(tmp_path / "model")
    kit.student().save_pretrained(path)
    kit.TOKENIZER.save_pretrained(path)
    with pytest.raises(ConfigError, match=r"same weights.*checkpoint you meant"):
        kit.trainer(tmp_path, method, model=path, teacher_model=path)


def test_one_path_with_a_fresh_adapter_on_the_student_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same weights"):
        kit.trainer(tmp_path, teacher_model=kit.student(), peft_config=LORA)


def test_one_path_read_in_two_precisions_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same weights"):
        kit.trainer(tmp_path, teacher_model=kit.student().to(torch.bfloat16))


def test_a_teacher_of_equal_shape_and_other_weights_is_accepted(tmp_path: Path) -> None:
    kit.trainer(tmp_path, teacher_model=kit.teacher(spec=kit.STUDENT))


def test_privileged_information_alone_may_tell_a_teacher_from_its_student(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "privileged_teacher", teacher_model=kit.student())
    assert made.table.sources == {"privileged_teacher"}


def test_a_missing_teacher_is_named_with_what_needs_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dopd' needs a teacher.*teacher_model_name_or_path"):
        kit.trainer(tmp_path, teacher_model=None)


def test_the_teacher_named_in_the_config_is_used(tmp_path: Path) -> None:
    path = str(tmp_path / "teacher")
    kit.teacher().save_pretrained(path)
    kit.TOKENIZER.save_pretrained(path)
    made = kit.trainer(tmp_path, teacher_model=None, teacher_model_name_or_path=path)
    assert made.teacher_model.config.hidden_size == kit.TEACHER.hidden_size


@pytest.mark.parametrize("name", ["model", "teacher_model"])
def test_an_unreadable_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"^{name}: .*nowhere.* cannot be read"):
        kit.trainer(tmp_path, **{name: str(tmp_path / "nowhere")})


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "teacher")
    kit.teacher().save_pretrained(path)
    words = kit.TOKENIZER.convert_ids_to_tokens(range(3, len(kit.TOKENIZER)))
    build_tokenizer(words[::-1]).save_pretrained(path)
    with pytest.raises(ModelError, match=r"tokenizers of student and teacher differ in .* token ids do not mean"):
        kit.trainer(tmp_path, teacher_model=path)


def test_a_teacher_with_another_chat_template_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "teacher")
    kit.teacher().save_pretrained(path)
    other = build_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save_pretrained(path)
    kit.trainer(tmp_path, teacher_model=path)
    assert "chat templates differ" in messages(caplog)


def test_end_of_sequence_and_precision_differences_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = kit.teacher().to(torch.bfloat16)
    teacher.generation_config.eos_token_id = 5
    kit.trainer(tmp_path, teacher_model=teacher)
    assert "the student stops at [1], the teacher at [5]" in messages(caplog)
    assert "precision differs" in messages(caplog)


# --- Dead or broken models


def test_a_uniform_teacher_is_reported_as_dead(tmp_path: Path) -> None:
    teacher = kit.teacher()
    torch.nn.init.zeros_(teacher.lm_head.weight)
    with pytest.raises(ScoringError, match="privileged_teacher is dead: its distribution is uniform over 63 tokens"):
        kit.trainer(tmp_path, teacher_model=teacher).train()


def test_a_teacher_whose_output_ignores_its_input_is_reported_as_dead() -> None:
    logprobs, mask = torch.full((4, 4), -1.5), torch.ones(4, 4)
    with pytest.raises(ScoringError, match="does not depend on its input"):
        check_alive("teacher", logprobs, torch.full((4, 4), 2.0), mask, 63)
    check_alive("teacher", logprobs + 0.01 * torch.rand(4, 4), 2 + torch.rand(4, 4), mask, 63)


def test_a_student_that_dies_while_it_trains_has_diverged(tmp_path: Path) -> None:
    """Its checkpoint was well, for a step was taken from it."""
    with pytest.raises(ScoringError, match=r"privileged_student.*diverged\. Lower learning_rate") as caught:
        kit.trainer(tmp_path, optim="adamw_torch", learning_rate=1e3, max_steps=4).train()
    assert "check the checkpoint" not in str(caught.value)


def test_a_teacher_that_says_one_thing_everywhere_is_dead_whatever_was_sampled() -> None:
    """One distribution at all positions: a token has the same log-prob wherever it stands."""
    ids = torch.tensor([[3, 4, 5, 3], [5, 5, 4, 3], [4, 3, 3, 5]])
    logprobs = torch.tensor([0.0, 0.0, 0.0, -0.5, -1.5, -1.7])[ids]
    arguments = (logprobs, torch.full((3, 4), 1.0), torch.ones(3, 4), 63)
    with pytest.raises(ScoringError, match="does not depend on its input"):
        check_alive("teacher", *arguments, ids=ids)
    logprobs[0, 0] -= 0.01
    check_alive("teacher", *arguments, ids=ids)


def test_a_model_that_is_certain_of_every_token_is_not_dead(tmp_path: Path) -> None:
    """Its scores are all 0, and its output depends on its input all the same."""
    certain = kit.student()
    with torch.no_grad():
        certain.get_output_embeddings().weight.mul_(1e4)
    made = kit.trainer(tmp_path, model=certain, train_dataset=Dataset.from_list(kit.uneven_rows()))
    batch = kit.rollout(made)
    kept = batch["completion_mask"] != 0
    assert batch["entropy/privileged_student"][kept].max() < 1e-6
    zeros = torch.zeros(3, 4)
    check_alive("student", zeros, zeros, torch.ones(3, 4), 63, hidden=torch.randn(3, 4, 8))
    with pytest.raises(ScoringError, match="student is dead"):
        check_alive("student", zeros, zeros, torch.ones(3, 4), 63, hidden=torch.ones(3, 4, 8))


def test_a_model_that_does_not_read_its_input_is_dead_even_if_it_is_certain(tmp_path: Path) -> None:
    dead = kit.student()
    with torch.no_grad():
        dead.get_output_embeddings().weight.mul_(1e4)
    last_norm = dead.model.norm
    last_norm.register_forward_hook(lambda module, arguments, output: torch.ones_like(output))
    made = kit.trainer(tmp_path, model=dead, train_dataset=Dataset.from_list(kit.uneven_rows()))
    with pytest.raises(ScoringError, match="is dead"):
        kit.rollout(made)


def test_equal_answers_of_one_token_are_no_sign_of_a_dead_teacher() -> None:
    """A student that stops at once on one prompt is scored at one position: equal scores are right there."""
    mask = torch.zeros(8, 3)
    mask[:, 0] = 1
    check_alive("teacher", torch.full((8, 3), -1.5), torch.full((8, 3), 2.0), mask, 63)


@pytest.mark.parametrize("name", ["model", "teacher_model"])
def test_nan_weights_are_an_error_before_the_first_step(tmp_path: Path, name: str) -> None:
    broken = kit.student() if name == "model" else kit.teacher()
    torch.nn.init.constant_(broken.model.layers[0].mlp.down_proj.weight, float("nan"))
    with pytest.raises(ScoringError, match=f"{name}: its logits are not finite"):
        kit.trainer(tmp_path, **{name: broken})


def test_a_student_that_diverges_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, max_steps=4)
    made.args.learning_rate = 1e38  # no configuration may have it
    with pytest.raises(ScoringError, match="lower learning_rate"):
        made.train()


def test_a_nan_loss_stops_the_run_and_is_not_averaged_away(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "vanilla")
    batch = kit.rollout(made)
    batch["hidden/teacher"].fill_(float("nan"))
    with pytest.raises(ScoringError, match="loss is nan"):
        made.compute_loss(made.model, [batch.batch])


def test_an_unknown_step_after_the_head_is_caught_by_the_self_divergence(tmp_path: Path) -> None:
    """A model that changes its logits in a way no config declares would be trained on logits it never produces."""
    model = kit.student()
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output["logits"] * 1.1))
    with pytest.raises(ModelError, match=r"model: its logits and those rebuilt .* differ by KL"):
        kit.trainer(tmp_path, model=model)


def test_one_regime_with_nearly_every_token_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.trainer(tmp_path).train()
    kit.trainer(tmp_path, "vanilla").train()  # its only row has every token, as it should
    assert "of the tokens are in regime" not in messages(caplog)

    def all_low(teacher: Any, student: Any, mask: torch.Tensor, thresholds: Any) -> torch.Tensor:
        return torch.where(mask != 0, 0, -1)

    monkeypatch.setattr(assignment, "classify", all_low)
    kit.trainer(tmp_path).train()
    assert "100.0% of the tokens are in regime LH" in messages(caplog)


# --- Dropout


def with_dropout(attention: float = 0.0, modules: float = 0.0) -> Any:
    model = kit.student()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = attention
        if modules:
            layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(modules))
    return model


def test_dropout_in_one_view_only_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kit.trainer(tmp_path, model=with_dropout(modules=0.1), disable_dropout=False)
    assert "dropout is active in 2 modules" in messages(caplog)


def test_noise_that_was_asked_for_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kit.trainer(tmp_path, neftune_noise_alpha=5)
    assert "neftune_noise_alpha (=5) shakes the embeddings in the trained view alone" in messages(caplog)


def test_dropout_of_attention_weights_is_switched_off_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is a number on the attention layer and no module, so disabling dropout modules leaves it on."""
    assert guards.active_dropout(with_dropout(attention=0.1)) == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    made = kit.trainer(tmp_path, model=with_dropout(attention=0.5, modules=0.5))
    assert not messages(caplog)
    batch = kit.rollout(made)
    assert kit.loss_of(made, batch).item() == kit.loss_of(made, batch).item()


def test_noise_that_touches_a_few_tokens_alone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its experts are drawn in training mode, where two are nearly as likely."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        options = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3}
        models.append(PhimoeForCausalLM(PhimoeConfig(**text_kit._GROUPED, **options)))
    kit.trainer(tmp_path, model=models[0], teacher_model=models[1])
    assert "in training mode PhimoeForCausalLM gives other states than in evaluation mode" in messages(caplog)


def test_noise_of_a_model_that_is_no_dropout_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for noise in (0.0, 0.3):
        mixtral = text_kit.build("mixtral", router_jitter_noise=noise)
        teacher = text_kit.build("mixtral", seed=1)
        kit.trainer(tmp_path, model=mixtral, teacher_model=teacher, router_aux_loss_coef=0.0)
        told = "in training mode MixtralForCausalLM gives other states than in evaluation mode" in messages(caplog)
        assert told == (noise > 0)


# --- Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "beta .*selects the divergence"),
        ({"label_smoothing_factor": 0.1}, "no method here has labels: remove it"),
        ({"train_sampling_strategy": "sequential"}, "is not read: set shuffle_dataset=False"),
        ({"num_generations": 3}, "= 8 completions a step must be a multiple of num_generations"),
        ({"num_generations": 0}, "num_generations .* at least 1"),
        ({"overlong_prompts": "cut"}, "overlong_prompts"),
        ({"loss_backend": "fast"}, "backend"),
        ({"privileged_student": "old"}, "privileged_student"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"method": "dop"}, "Did you mean .*'dopd'"),
        ({"method_options": {"topk": 3}}, "no option topk"),
        ({"method_options": "top_k=3"}, "method_options .* is not JSON"),
        ({"rules": "{}"}, "rules .* must be list of mapping, got dict"),
        ({"rules": [{"source": "teacher"}], "method_options": {"top_k": 3}}, "write them into the rules"),
        ({"student_eval_steps": 1}, "needs? a verifier and an eval_dataset"),
        ({"max_completion_length": 600}, "leaves no room for a prompt"),
        ({"max_prompt_length": 510}, "do not fit together"),
        ({"privileged_template": "{prompt}"}, "privileged_context"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kit.trainer(tmp_path, **options)


def test_a_dataset_smaller_than_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 1 prompts and one optimizer step takes 2"):
        kit.trainer(tmp_path, train_dataset=Dataset.from_list(kit.task_rows(1)))


def test_a_stream_that_ends_before_the_run_does_is_refused_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The host ends such a run as if it were whole: two prompts make a step, and one-way streams give them once."""
    rows = kit.task_rows(3)
    short = IterableDataset.from_generator(lambda: iter(rows[:1]))
    with pytest.raises(DataError, match="a stream, ended before it gave the 2 prompts of one optimizer step"):
        kit.trainer(tmp_path / "short", train_dataset=short, max_steps=3).train()
    once = iter(rows)
    made = kit.trainer(tmp_path / "once", train_dataset=IterableDataset.from_generator(lambda: once), max_steps=3)
    made.train()
    assert made.state.global_step == 1
    assert [line for line in caplog.messages if "the run ends at step 1 of 3. Give one that can be read more" in line]


def test_tools_and_an_evaluation_of_a_stream_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tools"):
        kit.DOPDTrainer(model=kit.student(), args=kit.config(tmp_path), tools=[print])
    stream = IterableDataset.from_generator(lambda: iter(kit.task_rows(4)))
    with pytest.raises(ConfigError, match="eval_dataset with a length"):
        kit.trainer(tmp_path, eval_dataset=stream, verifier=kit.TASK.verify, student_eval_steps=1)


def test_a_model_that_declares_no_longest_context_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit.trainer(tmp_path)
    for model in (made.model, made.teacher_model):
        monkeypatch.setattr(type(model.config), "get_text_config", lambda self: object())
    assert max_prompt_tokens(made) > 10**9


# --- Command lines of TRL users


ARGUMENTS = ["--output_dir", "out", "--use_cpu", "--bf16", "False", "--method", "vanilla", "--num_generations", "2"]
ROWS = '[{"source": "teacher", "divergence": "js"}]'


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_parsers_of_transformers_and_trl_read_the_config(parser: Any) -> None:
    made = parser([DOPDConfig]).parse_args_into_dataclasses(
        [
            *(*ARGUMENTS, "--method_options", '{"divergence": "forward_kl"}', "--student_eval_steps", "5"),
            *("--resume_from_checkpoint", "false"),
        ]
    )[0]
    assert made.resume_from_checkpoint is None
    assert (made.method, made.num_generations, made.student_eval_steps) == ("vanilla", 2, 5)
    assert made.routing_table().rules[0].divergence == "forward_kl"
    custom = parser([DOPDConfig]).parse_args_into_dataclasses([*ARGUMENTS[:5], "--rules", ROWS])[0]
    assert custom.routing_table().rules[0].divergence == "js"


def test_trl_reads_the_config_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: out\nuse_cpu: true\nbf16: false\nmethod_options: {top_k: 7}\nprivileged_student: ema\n"
    )
    (made,) = TrlParser([DOPDConfig]).parse_args_and_config(["--config", str(path)])
    assert made.routing_table().rules[0].top_k == 7 and made.routing_table().name == "dopd_ema"


def test_configs_of_tiny_models_round_trip(tmp_path: Path) -> None:
    kit.student(spec=TinySpec(num_layers=1)).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == len(kit.TOKENIZER)
