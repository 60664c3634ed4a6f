"""What was probably meant by a key that no recipe has: the words of timm, Hugging Face's Trainer and Lightning."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

# Section by what others call it.
SECTIONS = {
    "optim": "optimizer optimiser optimization optimisation optimizers optimizer_args scheduler lr_scheduler sched "
    "loss",
    "train": "training trainer training_args training_arguments fit run experiment hparams checkpoint checkpointing "
    "logging",
    "data": "dataset datasets dataloader dataloaders datamodule data_module loader augmentation augmentations "
    "transform transforms",
    "model": "network net arch architecture backbone head",
    "deepspeed": "ds ds_config zero zero_optimization precision",
}

# Key by what others call it.
KEYS = {
    "data.shards": "data_dir data_path dataset_path train_dir train_data root path dataset dataset_name data_root "
    "train_split_path url urls shard",
    "data.cache": "cache_dir cache_folder cache_path",
    "data.image_size": "img_size input_size image_sz imgsz crop_size train_crop_size resolution size img_sz",
    "data.crop_margin": "padding margin crop_padding",
    "data.crop": "random_resized_crop randomresizedcrop rrc train_crop_mode",
    "data.crop_scale": "scale",
    "data.crop_ratio": "ratio aspect_ratio",
    "data.eval_crop": "crop_mode center_crop centre_crop",
    "data.eval_crop_pct": "crop_pct",
    "data.auto_augment": "aa randaug randaugment rand_augment trivialaugment trivial_augment",
    "data.erasing": "reprob random_erasing random_erase",
    "data.grey": "grayscale greyscale random_grayscale grayscale_prob",
    "data.blur": "gaussian_blur gaussian_blur_prob",
    "data.flip": "hflip horizontal_flip random_flip fliplr",
    "data.brightness": "color_jitter colour_jitter colorjitter jitter",
    "data.mixup": "mixup_alpha",
    "data.cutmix": "cutmix_alpha",
    "data.mean": "img_mean image_mean normalize_mean pixel_mean",
    "data.std": "img_std image_std normalize_std pixel_std",
    "data.tokenizer": "tokenizer_name vocab vocab_file",
    "data.labels": "multilabel multi_label multi_label_classification problem_type label_type task_type",
    "data.shuffle_window": "shuffle_buffer shuffle_buffer_size buffer_size shuffle",
    "data.threads": "workers num_workers dataloader_num_workers n_workers nworkers num_threads",
    "data.prefetch": "prefetch_factor dataloader_prefetch_factor prefetch_batches",
    "model.backbone": "model name model_name model_name_or_path arch architecture encoder",
    "model.head": "head_type classifier global_pool pool",
    "model.text_tokens": "max_length max_seq_length text_length max_tokens",
    "model.weights": "pretrained checkpoint_path init_checkpoint initial_checkpoint pretrained_path finetune "
    "load_weights ckpt ckpt_path weights_path",
    "model.dropout": "drop drop_rate dropout_rate hidden_dropout_prob attn_drop proj_drop",
    "model.drop_path": "drop_path_rate stochastic_depth drop_connect dpr",
    "model.freeze": "freeze_layers freeze_backbone frozen freeze_blocks unfreeze num_frozen_layers",
    "model.checkpoint_blocks": "gradient_checkpointing grad_checkpointing activation_checkpointing "
    "use_gradient_checkpointing",
    "model.compile": "torch_compile torchcompile torchscript compile_model",
    "model.norm_eps": "layer_norm_eps eps layernorm_eps",
    "optim.name": "opt optim optimizer optimiser optimizer_name opt_name algorithm",
    "optim.lr": "learning_rate lrate base_lr lr_base blr max_lr peak_lr init_lr initial_lr learningrate learn_rate",
    "optim.betas": "opt_betas beta adam_beta1 adam_beta2 beta1 beta2",
    "optim.weight_decay": "wd decay weightdecay l2 weight_decay_rate",
    "optim.layer_decay": "layer_wise_decay layerwise_decay llrd layer_lr_decay layer_wise_lr_decay",
    "optim.schedule": "sched scheduler lr_scheduler lr_scheduler_type lr_schedule schedule_type policy",
    "optim.decay_epochs": "lr_step_size step_size decay_milestones milestones lr_steps",
    "optim.decay_factor": "decay_rate gamma lr_gamma lr_decay lr_decay_rate",
    "optim.lr_scaling": "lr_base_scale scale_lr auto_scale_lr",
    "optim.lr_reference_batch": "lr_base_size base_batch_size",
    "optim.label_smoothing": "smoothing label_smoothing_factor label_smooth ls",
    "optim.class_weights": "class_weight weighted_loss balanced class_balance loss_weights",
    "optim.positive_weight": "pos_weight positive_weights bce_pos_weight",
    "optim.clip_norm": "clip clip_grad max_grad_norm gradient_clip_val gradient_clipping grad_clip clip_grad_norm "
    "max_norm grad_clip_norm",
    "train.run": "output output_dir out_dir save_dir log_dir logging_dir default_root_dir run_name experiment run_dir "
    "logdir work_dir workdir exp_name run_folder",
    "train.seed": "random_seed manual_seed data_seed seed_everything",
    "train.epochs": "epoch num_epochs n_epochs max_epochs num_train_epochs total_epochs nepochs training_epochs",
    "train.batch_size": "batch bs batchsize global_batch_size train_batch_size total_batch_size mini_batch_size "
    "mini_batch",
    "train.micro_batch_size": "micro_batch microbatch per_device_train_batch_size per_gpu_train_batch_size "
    "per_device_batch_size train_micro_batch_size_per_gpu batch_size_per_gpu local_batch_size",
    "train.ema": "model_ema model_ema_decay ema_decay use_ema ema_rate",
    "train.eval_batch_size": "per_device_eval_batch_size validation_batch_size val_batch_size test_batch_size "
    "per_gpu_eval_batch_size vbs",
    "train.eval_every": "eval_interval val_interval check_val_every_n_epoch validate_every eval_steps eval_strategy "
    "evaluation_strategy val_check_interval eval_freq val_every eval_epochs",
    "train.threshold": "prediction_threshold decision_threshold bce_target_thresh multi_label_threshold",
    "train.log_every": "log_interval logging_steps log_every_n_steps print_freq log_freq log_steps log_every_steps",
    "train.stop_after_steps": "max_steps total_steps num_steps train_steps max_iters iterations num_training_steps",
    "train.patience": "early_stop early_stopping early_stopping_patience patience_epochs",
    "train.monitor": "metric_for_best_model eval_metric best_metric",
    "train.keep_checkpoints": "save_total_limit checkpoint_hist save_top_k keep_last keep_n max_checkpoints",
    "train.timeout_s": "timeout ddp_timeout nccl_timeout",
    "train.skip_bad_steps": "skip_nan skip_nonfinite detect_anomaly terminate_on_nan",
    "train.profile_steps": "profile profiler",
    "train.wandb_project": "wandb project use_wandb report_to log_wandb logger wandb_name",
    "train.channels_last": "memory_format",
    "deepspeed.precision": "amp amp_dtype fp16 bf16 tf32 mixed_precision dtype half use_amp float16 bfloat16 "
    "torch_dtype precision_plugin autocast",
    "deepspeed.zero_stage": "zero stage zero3 zero_optimization fsdp sharding",
    "deepspeed.offload": "cpu_offload offload_optimizer offload_param offload_optimizer_device",
    "deepspeed.config": "deepspeed deepspeed_config ds_config ds_config_file",
}

_OTHERWISE = """\
load_best_model_at_end restore_best_weights
    the best checkpoint on val, by train.monitor, is kept beside the newest, and is the one that is used later
gradient_accumulation_steps accumulate_grad_batches grad_accum_steps accumulation accum_iter grad_accumulation
gradient_accumulation accumulation_steps accum grad_accum
    accumulation follows from train.batch_size, the global batch, the number of ranks and train.micro_batch_size
warmup_epochs
    give the warm-up in steps, as optim.warmup_steps; an epoch has (images of train) / train.batch_size of them
warmup warmup_ratio warmup_lr warmup_prefix num_warmup_steps warm_up warmup_fraction
    the warm-up, from rate 0, is given in steps: optim.warmup_steps
min_lr eta_min lr_min lr_end cooldown_epochs
    optim.schedule cosine goes down to 0
devices gpus num_gpus n_gpu nproc_per_node num_nodes accelerator nodes world_size strategy num_processes ranks
distributed ddp gpu_ids
    the number of ranks is the launcher's: `deepspeed --num_gpus N launch/train.py ...`, or a hostfile
num_classes n_classes nb_classes classes num_labels class_names labels
    the classes are those of the shard set
augmix vflip interpolation aug_splits augmentation augmentations rotation rotate
    there is no such augmentation: there are data.crop, flip, auto_augment, brightness, contrast, saturation, hue,
    grey, blur, erasing, mixup and cutmix
test_size val_size val_split train_split val_ratio split splits folds validation_split val_dir test_dir val_data
    the splits are those of the shard set, which `python -m shards build --ratios` makes
drop_last dataloader_drop_last
    nothing is dropped: every sample is used once in each epoch
pin_memory pin_mem dataloader_pin_memory persistent_workers use_multi_epochs_loader
    the loader sees to that by itself
save_steps save_strategy save_every save_freq save_interval checkpoint_every every_n_epochs save_best save_last
enable_checkpointing
    a checkpoint is written at the end of each epoch; train.keep_checkpoints of them stay, and the best
resume resume_from resume_from_checkpoint auto_resume
    resuming is not part of a recipe: --resume auto, or --resume FOLDER
do_train do_eval do_predict eval_only evaluate validate test predict
    that is a command of its own: `dist-train evaluate RUN`, `dist-train predict RUN IMAGE`
tensorboard log_tensorboard csv_log
    a run writes tensorboard/ and metrics.jsonl in any case
patch_size depth num_heads embed_dim hidden_size width num_layers layers num_hidden_layers
    it is in the name of model.backbone, as vit_small_patch16
limit_train_batches fast_dev_run overfit_batches dry_run max_time
    `dist-train train --dry-run` makes a few steps and leaves nothing; train.stop_after_steps ends a run early
sync_batchnorm sync_bn dist_bn
    the running statistics of batch norms are averaged over the ranks in any case
overwrite overwrite_output_dir exist_ok
    no run is written over: choose another train.run, or --resume auto
push_to_hub hub_model_id
    a run uploads nothing; afterwards `dist-train export RUN --hub USER/NAME` does
nesterov amsgrad epsilon adam_epsilon opt_eps lookahead adafactor bce_loss focal_loss loss_fn loss_function criterion
    the optimizers are SGD with momentum and AdamW, the loss is cross-entropy, binary with data.labels tags, all
    without further settings
"""
SENTENCES = [
    (words, " ".join(sentence.split())) for words, sentence in re.findall(r"((?:\S.*\n)+)((?:    .*\n)+)", _OTHERWISE)
]
"""What others have a key for, and this project does otherwise, or not at all: their words, and what to say of them."""

_KEY_OF = {word: key for key, words in KEYS.items() for word in words.split()}
_SECTION_OF = {word: section for section, words in SECTIONS.items() for word in words.split()}
_SENTENCE_OF = {word: sentence for words, sentence in SENTENCES for word in words.split()}


def advice_for_key(name: str, known: Collection[str]) -> str:
    """What to do instead of `SECTION.KEY`, or a bare KEY, that no recipe has; empty where nothing is like it.

    known: all keys, as SECTION.KEY.
    """
    section, _, last = _plain(name).rpartition(".")
    last = last.rpartition(".")[2]
    in_all = {key.partition(".")[2]: key for key in known}
    if f"{section}.{last}" in known:
        return f"write {section}.{last}"
    if section and _KEY_OF.get(last, "").startswith(f"{section}."):  # model.name is no slip for optim.name
        return f"here it is {_KEY_OF[last]}"
    if last in in_all:
        return f"it is {in_all[last]}"
    if last in _SENTENCE_OF:
        return _SENTENCE_OF[last]
    if last in _KEY_OF:
        return f"here it is {_KEY_OF[last]}"
    return f"did you mean {in_all[near]}?" if (near := _nearest(last, in_all)) else ""


def advice_for_section(name: str, known_sections: Collection[str], known_keys: Collection[str]) -> str:
    """The same for a section, or for a key that stands where a section should."""
    plain = _plain(name)
    if plain in known_sections:
        return f"write {plain}"
    if near := _nearest(plain, known_sections):
        return f"did you mean {near}?"
    if plain in _SECTION_OF:
        return f"here it is {_SECTION_OF[plain]}"
    return advice_for_key(plain, known_keys)


def _nearest(word: str, known: Collection[str]) -> str | None:
    """The known word that a slip of the pen may have made `word` of."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.75)), None)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")
