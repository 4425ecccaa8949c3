"""Every field of a run, once. The other configs override fields of this one and add none.

Any scalar can be set on the command line: `--config=configs/sysu.py --config.optim.learning_rate=1e-3`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation, plan and augmentation
    config.preset = "paper"  # 'paper' or 'official' (the published program); only recorded, see apply_preset
    config.dtype = "auto"  # of convolutions and matmuls: 'float32', 'bfloat16'; auto: bfloat16 on accelerators
    config.parallel = "pmap"  # how several devices share a step: 'pmap' or 'shard_map'; the same numbers
    config.batch_scale = "global"  # data.num_ids_per_batch is of the whole batch; 'per_device': of each device's share
    config.init_from = ""  # ImageNet ResNet-50: a .safetensors or .pth file or 'hf:owner/repository'; '': random

    config.dataset = ConfigDict()
    config.dataset.name = "sysu_mm01"  # 'sysu_mm01', 'regdb' or 'llcm'
    config.dataset.source = ""  # the raw folder; needed once, to prepare
    config.dataset.data_dir = "data"  # where prepared data sets and caches live
    config.dataset.trial = 1  # RegDB: which of the ten splits; ignored elsewhere

    config.data = ConfigDict()
    config.data.height = 384  # pixels after the resize
    config.data.width = 128
    config.data.num_ids_per_batch = 16  # P
    config.data.images_per_id = 8  # K, half visible, half infrared
    config.data.cache = "auto"  # resized images in 'device' memory, 'host' memory map, 'none', or what fits: 'auto'
    config.data.num_workers = -1  # processes that decode when nothing is cached; 0: threads of this one; -1: chosen

    config.augment = ConfigDict()
    config.augment.flip_probability = 0.5
    config.augment.crop_padding = 0  # pixels; 0: no crop
    config.augment.crop_fill = 127  # the padding's value
    config.augment.erase_probability = 0.5
    config.augment.erase_area = (0.02, 0.33)  # share of the image
    config.augment.erase_aspect = (0.3, 3.3)  # height / width

    config.model = ConfigDict()
    config.model.stage_sizes = (3, 4, 6, 3)  # ResNet-50
    config.model.width = 64  # channels of the stem
    config.model.channel_module = "mam"  # after stages 3 and 4: 'mam', 'se', 'in', 'cbam', 'none'
    config.model.pattern_module = "pam"  # 'pam', 'non_local', 'none'
    config.model.num_patterns = 6  # l
    config.model.reduction = 16  # r of eq. 2

    config.loss = ConfigDict()  # weights of eq. 14; 0 leaves a term out
    config.loss.identity = 1.0
    config.loss.center_cluster = 1.0
    config.loss.separation = 0.5  # λ₁
    config.loss.modality_identity = 0.5  # λ₂
    config.loss.mutual_mean = 2.5  # λ₃
    config.loss.margin = 0.7  # ρ
    config.loss.per_modality_identity = True  # L_id as two means, summed; False: one mean over the batch
    config.loss.student_first = False  # L_MM as KL(own ‖ mean), one mean; False: eq. 10

    config.mean = ConfigDict()  # mean classifiers, eq. 11
    config.mean.rate = 0.2  # α
    config.mean.epochs_at_full = 0  # E > 0: α·min(E/(epoch+1), 1); 0: α is constant

    config.optim = ConfigDict()
    config.optim.learning_rate = 3.5e-4
    config.optim.milestones = (80, 120)  # epochs after which the rate is multiplied by `decay`
    config.optim.decay = 0.1
    config.optim.weight_decay = 5e-4  # L2, added to the gradient

    config.train = ConfigDict()
    config.train.num_epochs = 140
    config.train.eval_every_epochs = 20  # 0: only at the end
    config.train.checkpoint_every_epochs = 5  # 0: only at the end
    config.train.keep_checkpoints = 2  # the last ones
    config.train.log_every_steps = 50
    # Steps sent to the device as one program, at most, where it holds the images (else 1). 15 divide five epochs of
    # SYSU-MM01, so there one program does for the whole run.
    config.train.steps_per_call = 15

    config.eval = ConfigDict()
    config.eval.batch_size = 256
    config.eval.best = ""  # 'rank1', 'mAP', …: also keep the checkpoint that is best on the *test set*; '': don't
    config.eval.rerank = False  # k-reciprocal re-ranking; not part of any published MPANet figure
    return config


def apply_preset(config: ConfigDict, preset: str) -> ConfigDict:
    """Sets the fields in which the published program differs from the paper (`official`); `paper` changes nothing.

    The program also kept the best model on the test set, from evaluations every 5 epochs. That is left to the user:
    --config.eval.best=rank1 --config.train.eval_every_epochs=5
    """
    if preset not in ("", "paper", "official"):
        raise ValueError(f"unknown preset '{preset}' after the config's file name: expected 'paper' or 'official'")
    config.preset = preset or "paper"
    if preset == "official":
        config.augment.crop_padding = 10
        config.loss.modality_identity = 1.0  # the term is added twice with weight 0.5
        config.loss.per_modality_identity = False
        config.loss.student_first = True
        config.mean.epochs_at_full = 100
    return config
