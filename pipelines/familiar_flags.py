"""Flags as users of other tools type them, so that an error message can name ours."""

from collections.abc import Collection

_OPTIMIZER, _TRUNK = "model.optimizer", "model.network.backbone"

FAMILIAR = {
    # the optimiser
    "lr learning_rate base_lr max_lr": (f"{_OPTIMIZER}.lr",),
    "min_lr end_lr final_lr": (f"{_OPTIMIZER}.final_lr",),
    "wd weight_decay": (f"{_OPTIMIZER}.weight_decay",),
    "warmup warmup_steps warmup_epochs warmup_ratio warmup_iters warmup_updates num_warmup_steps": (
        f"{_OPTIMIZER}.warmup",
    ),
    "opt optim optimizer": (f"{_OPTIMIZER}.name",),
    "betas adam_betas opt_betas": (f"{_OPTIMIZER}.betas",),
    "sched scheduler lr_scheduler lr_scheduler_type schedule lr_decay_style": (f"{_OPTIMIZER}.schedule",),
    # the length of the training
    "epochs e max_epochs max_epoch num_epochs num_train_epochs n_epochs": ("trainer.max_epochs",),
    "steps iters max_steps max_iters num_steps train_steps train_iters max_train_steps total_steps": (
        "trainer.max_steps",
    ),
    # the data
    "data data_dir data_path data_root dataset dataset_name train_data train_file data_set": ("data.source",),
    "val_data val_file validation_file validation_data": ("data.val_source",),
    "test_data test_file": ("data.test_source",),
    "b bs batch batch_size train_batch_size per_device_train_batch_size per_gpu_batch_size micro_batch_size": (
        "data.batch_size",
        "batch_size",
    ),
    "eval_batch_size val_batch_size per_device_eval_batch_size": ("data.eval_batch_size", "batch_size"),
    "j workers num_workers n_workers dataloader_num_workers": ("data.num_workers", "num_workers"),
    "img_size image_size input_size imgsz resolution": ("data.image_size",),
    "tokenizer tokenizer_name": ("data.tokenizer", "tokenizer"),
    "max_length max_seq_length seq_len seq_length block_size context_length max_len sequence_length": (
        "data.max_length",
    ),
    # the machine
    "gpus gpu num_gpus ngpus ngpu n_gpu devices nproc nproc_per_node num_processes": ("trainer.devices", "device"),
    "nodes nnodes num_nodes num_machines": ("trainer.num_nodes",),
    "device accelerator cuda cpu": ("trainer.accelerator", "device", "accelerator"),
    "strategy fsdp deepspeed ddp": ("trainer.strategy",),
    "precision amp fp16 bf16 mixed_precision dtype": ("trainer.precision", "precision", "dtype"),
    # a step
    "accum accum_freq accum_iter accumulate grad_accum grad_accum_steps accumulate_grad_batches "
    "gradient_accumulation_steps update_freq": ("trainer.accumulate_grad_batches",),
    "clip clip_grad grad_clip clip_grad_norm max_grad_norm gradient_clip_val grad_clip_norm": (
        "trainer.gradient_clip_val",
    ),
    "log_every log_interval logging_steps print_freq log_every_n_steps": ("trainer.log_every_n_steps",),
    "eval_every eval_interval eval_steps val_freq val_check_interval": ("trainer.val_check_interval",),
    # the network
    "dim width hidden_size hidden_dim embed_dim n_embd d_model": (f"{_TRUNK}.dim",),
    "depth layers num_layers n_layer n_layers num_hidden_layers": (f"{_TRUNK}.depth",),
    "heads num_heads n_head n_heads num_attention_heads": (f"{_TRUNK}.num_heads",),
    "dropout drop": (f"{_TRUNK}.dropout",),
    "drop_path stochastic_depth": (f"{_TRUNK}.drop_path",),
    "patch_size": ("model.network.patch_size",),
    "smoothing label_smoothing": ("model.label_smoothing",),
    "mixup mixup_alpha": ("model.mixup",),
    "cutmix cutmix_alpha": ("model.cutmix",),
    "freeze freeze_layers freeze_blocks": ("model.freeze_blocks",),
    # a run
    "init pretrained finetune model_name_or_path initial_checkpoint init_from load": ("model.init_from", "checkpoint"),
    "seed random_seed": ("seed_everything", "seed"),
    "resume_from resume_from_checkpoint resume_path": ("resume",),
    "ckpt ckpt_path checkpoint_path weights model model_path": ("checkpoint", "ckpt_path", "resume"),
    "o out output output_dir out_dir save_dir log_dir logdir default_root_dir experiment_dir": ("output", "run_dir"),
    "name run_name exp_name experiment": ("name",),
    "wandb logger report_to": ("trainer.logger",),
    "torch_compile torchcompile": ("compile",),
    # generation
    "max_tokens max_new_tokens num_tokens": ("max_new_tokens",),
    "beams beam_size num_beams": ("num_beams",),
    "temp t": ("temperature",),
}
"""Names with spaces between them -> our flags for them; a command has at most one of these."""

_BY_NAME = {name: ours for names, ours in FAMILIAR.items() for name in names.split()}


def familiar(flag: str, known: Collection[str]) -> str | None:
    """The flag of this command for what another tool calls `flag`; None if there is none.

    Args:
        flag: as typed, without its first dashes.
        known: names of the command's flags.
    """
    ours = _BY_NAME.get(flag.lower().replace("-", "_"), ())
    return next((name for name in ours if name in known), None)
