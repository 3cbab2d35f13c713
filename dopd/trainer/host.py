"""Names of the host that the trainer stands on; a test fails by name when a release of TRL changes one."""

# Methods of TRL's DistillationTrainer that `DOPDTrainer` overrides or calls.
HOST_HOOKS = (
    "get_train_dataloader",
    "_get_train_sampler",
    "_get_dataloader",
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_tokenize_prompts",
    "_generate_single_turn",
    "_compute_loss",
    "compute_loss",
    "training_step",
    "train",
    "_determine_best_metric",
    "save_model",
    "_save",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_best_model",
    "_load_optimizer_and_scheduler",
    "_push_from_checkpoint",
    "_get_output_dir",
)
