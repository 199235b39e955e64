"""What may stand for a run's options that have a fixed choice of values."""

from typing import Literal

TaskName = Literal["text-generation", "text-classification", "image-classification"]
TrainMethod = Literal["dora", "lora", "magnitude", "full", "head"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["nf4", "int8", "torchao-int8", "torchao-int4"]
Schedule = Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"]
Augmentation = Literal["crop", "flip", "rotate", "color"]
Reporter = Literal["tensorboard", "wandb", "trackio"]
