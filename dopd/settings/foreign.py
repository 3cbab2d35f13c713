"""Names of settings elsewhere (older transformers, TRL's other trainers, everyday short forms), and what is here."""

# Key here -> its names elsewhere.
_SAME = {
    "learning_rate": "lr initial_lr lrate",
    "num_train_epochs": "epochs num_epochs n_epochs train_epochs max_epochs epoch num_epoch",
    "max_steps": "steps num_steps train_steps num_train_steps total_steps",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm grad_norm",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps grad_accum_steps",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule lr_decay_style",
    "optim": "optimizer optimizer_type adafactor",
    "eval_strategy": "evaluation_strategy evaluate_during_training",
    "model_name_or_path": (
        "model student student_model model_name model_id model_path base_model student_name student_path "
        "pretrained_model_name_or_path"
    ),
    "teacher_model_name_or_path": ("teacher teacher_model teacher_name teacher_name_or_path teacher_path teacher_id"),
    "teacher_server": "teacher_server_urls teacher_server_url teacher_model_server_url",
    "dataset_name": "dataset data data_path train_file train_dataset dataset_path",
    "output_dir": "output out out_dir save_dir logging_dir checkpoint_dir",
    "overwrite": "overwrite_output_dir force",
    "report_to": "wandb tensorboard tracker logger",
    "resume_from_checkpoint": "resume checkpoint resume_from",
    "dtype": "torch_dtype precision",
    "use_peft": "use_lora lora peft",
    "lora_r": "lora_rank r rank",
    "lora_target_modules": "target_modules lora_modules",
    "lora_modules_to_save": "modules_to_save",
    "use_cpu": "no_cuda cpu",
    "hub_token": "push_to_hub_token token hf_token use_auth_token",
    "hub_model_id": "push_to_hub_model_id repo_id hub_id",
    "torch_compile_backend": "torchdynamo",
    "include_for_metrics": "include_inputs_for_metrics",
    "accelerator_config": "split_batches dispatch_batches",
    "fsdp_config": "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
    "seed": "random_seed rng_seed",
    "save_steps": "save_every checkpoint_every save_freq save_interval",
    "logging_steps": "log_every log_steps log_interval",
    "student_eval_steps": "eval_every eval_interval eval_freq test_freq",
    "max_completion_length": "max_new_tokens max_tokens completion_length response_length max_response_length",
    "num_generations": (
        "n num_samples num_rollouts rollouts num_return_sequences group_size n_samples_per_prompt "
        "samples_per_prompt n_rollouts rollout_n n_samples"
    ),
    "temperature": "temp sampling_temperature",
    "generation_kwargs": "generation_config sampling_params",
    "trace_steps": "log_completions_steps",
    "run_name": "wandb_run_name experiment_name",
    "dataset_config": "subset dataset_config_name",
    "dataset_train_split": "split train_split",
    "use_vllm": "vllm",
    "rollout_importance: truncated": "vllm_importance_sampling_correction vllm_importance_sampling_mode",
    "rollout_importance_cap": "vllm_importance_sampling_cap vllm_importance_sampling_clip_max",
    "verifier": "judge grader verifier_fn",
    "log_unique_prompts": "wandb_log_unique_prompts",
}
# (key here, what is to be known of it) -> names elsewhere of what is not quite the same thing.
_LIKE = {
    ("warmup_steps", " (below 1 it is the share of all steps)"): "warmup warmup_ratio",
    (
        "per_device_train_batch_size",
        ", on each device, counting completions: step = it x processes x "
        "gradient_accumulation_steps, a multiple of num_generations",
    ): (
        "batch_size train_batch_size bs per_gpu_train_batch_size generation_batch_size "
        "steps_per_generation per_device_batch_size micro_batch_size micro_train_batch_size "
        "train_micro_batch_size_per_gpu global_batch_size"
    ),
    ("teacher_server", ", the address of the server"): "use_teacher_server",
    ("dataset_eval_name", ", or dataset_test_split for a split of dataset_name"): (
        "eval_dataset validation_file eval_file"
    ),
    ("model_init_kwargs", ": {attn_implementation: ...}"): (
        "attn_implementation use_flash_attention_2 flash_attention"
    ),
    ("model_init_kwargs", ": {revision: ...}"): "model_revision revision",
    ("max_context", " for prompt and completion together, max_prompt_length and max_completion_length for each"): (
        "max_length max_seq_length max_seq_len context_length max_model_len"
    ),
    ("reward_funcs", ", functions of a batch, or verifier, a function that scores an answer"): (
        "reward_fn reward_function rewards reward reward_func"
    ),
    ("reward_funcs", ", with a function that asks the model"): (
        "reward_model reward_model_name_or_path reward_model_path"
    ),
    ("privileged_template", ", with {prompt} and {privileged_context}"): (
        "teacher_prompt_template reprompt_template solution_template feedback_template"
    ),
    ("privileged_student", ": current, frozen, ema or snapshot"): "teacher_model_kind",
    ("ema_decay", ", which is 1 - teacher_update_rate"): "teacher_update_rate ema_rate",
    ("ema_decay", ", which is 1 - ref_model_mixup_alpha"): "ref_model_mixup_alpha",
    ("snapshot_steps", ", with privileged_student: snapshot"): (
        "teacher_sync_steps ref_model_sync_steps sync_ref_model"
    ),
    ("method_options", ": {top_k: ...}"): "distillation_topk loss_top_k teacher_top_k",
    ("method_options", ": {tail: ...}"): "distillation_add_tail loss_add_tail add_tail_bucket",
    ("method", ", or the divergence of each rule in rules"): (
        "distillation_mode distillation_objective distillation_alpha loss_type kl_type divergence "
        "reverse_kl_top_1_mode f_divergence_type algorithm"
    ),
    ("lr_scheduler_kwargs", ", with lr_scheduler_type: cosine_with_min_lr"): "min_lr min_learning_rate",
    ("dataset_test_split", ", a split of dataset_name, or dataset_eval_split, of dataset_eval_name"): (
        "eval_split val_split test_split validation_split"
    ),
    ("dataset_train_split", ": train[:1000]"): "max_samples max_train_samples num_train_samples",
    ("columns", ": {prompt: NAME, privileged_context: NAME, answer: NAME}"): (
        "column_mapping privileged_context hint hints hint_column privileged_column context_column "
        "solution_column answer_column"
    ),
    ("load_in_4bit", " or load_in_8bit"): "quantization qlora",
    ("rollout_engine", ", for an engine of your own"): (
        "use_transformers_continuous_batching use_transformers_paged transformers_continuous_batching_config"
    ),
}
_NOT_HERE = {
    "of importance weights there is rollout_importance alone: leave it out": "use_bias_correction_kl "
    "vllm_importance_sampling_clip_min "
    "sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos",
    "vLLM has the weights of the step whose answers it draws: leave it out": "vllm_sync_frequency",
    "logits are added up in float32 as it is: leave it out": "cast_lm_head_to_fp32",
    "students are causal language models: leave it out": "lora_task_type",
    "TRL reads it in its scripts for DPO alone: leave it out": "ignore_bias_buffers",
    "callbacks are for DOPDTrainer in Python": "callbacks",
    "traces show images of prompts, and tables of completions stay in output_dir: leave it out": ""
    "log_multimodal log_completions_hub_repo",
    "the method says what is shown as context: see `dopd methods`": "dont_reprompt_on_self_success "
    "environment_feedback_only_without_solution include_environment_feedback remove_thinking_from_demonstration",
    "warnings need no settings: leave it out": "diagnostics_flat_tolerance diagnostics_warning_interval",
    "every answer is the student's own (TRL's lmbda = 1): leave it out": "lmbda lambda seq_kd generate_from_teacher "
    "use_successful_as_teacher",
    "the answers of a step are used for one optimizer step, so there is nothing to clip: leave it out": "num_iterations"
    " epsilon epsilon_high delta importance_sampling_level distillation_is_clip off_policy_mask_threshold",
    "rollouts of like length run together as it is: leave it out": "group_by_length packing packing_strategy "
    "padding_free eval_packing",
    "nothing is truncated; overlong_prompts says what becomes of rows that are too long": "truncation_mode truncation "
    "max_reprompt_len",
    "the method says how rewards act: see `dopd methods`": "scale_rewards success_reward_threshold "
    "multi_objective_aggregation mask_truncated_completions top_entropy_quantile entropy_coef entropy_coef_delta "
    "entropy_coef_max entropy_coef_min entropy_target use_adaptive_entropy distillation_weight normalize_advantages "
    "reward_clip_range",
    "every token of an answer is learned from, as the method routes it: see `dopd methods`": "num_loss_tokens_to_skip "
    "assistant_only_loss completion_only_loss train_on_prompt",
    "student and teacher must have one vocabulary: use a teacher with the student's tokenizer": "use_uld_loss "
    "use_extended_uld teacher_tokenizer_name_or_path uld_use_hybrid_loss uld_token_merge_strategy "
    "uld_crossentropy_weight uld_distillation_weight uld_hybrid_matched_weight uld_hybrid_unmatched_weight "
    "uld_skip_student_eos uld_skip_teacher_eos uld_student_temperature uld_teacher_temperature",
    "the tokenizer, its special tokens and its chat template are those beside the model: save them there": "tokenizer "
    "tokenizer_name tokenizer_name_or_path eos_token pad_token chat_template chat_template_path",
    "the column with the prompt is called 'prompt': rename it in the dataset": "dataset_text_field text_column "
    "prompt_column",
    "`dopd config [WORD]` lists the keys": "keys",
    "processes are counted by a flag: dopd train CONFIG --accelerate_config multi_gpu --num_processes N": ""
    "num_gpus n_gpus n_gpu gpus device devices nproc_per_node",
    "targets come from the method, and no reference model is held near: see `dopd methods`": "kl_coef kl_beta "
    "init_kl_coef kl_penalty ref_model reference_model",
    "streams are for DOPDTrainer in Python": "dataset_streaming streaming",
    "the student's evaluation takes the likeliest answer to each prompt and a sampled one": "num_generations_eval",
    "the host writes safetensors alone: leave it out": "save_safetensors",
}
# Name elsewhere -> the key that has its place here.
KEY_OF = {name: key for key, names in _SAME.items() for name in names.split()}
KEY_OF |= {name: key for (key, _), names in _LIKE.items() for name in names.split()}
# Name elsewhere -> what to write, in words.
FOREIGN = {name: f"here it is {key}" for key, names in _SAME.items() for name in names.split()}
FOREIGN |= {name: f"here it is {key}{note}" for (key, note), names in _LIKE.items() for name in names.split()}
FOREIGN |= {name: sentence for sentence, names in _NOT_HERE.items() for name in names.split()}
