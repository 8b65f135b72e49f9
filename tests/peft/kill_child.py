"""Saves an adapter again and again, all of its values the number of the save."""

import sys

import numpy as np
from mindspore import Tensor
from small import Small, config

from mindpet.peft import get_peft_model

model = get_peft_model(Small(), config(r=64, target_modules=["query", "turned"]))
for number in range(10**6):
    for param in model.trainable_params():
        param.set_data(Tensor(np.full(param.shape, number, np.float32)))
    model.save_pretrained(sys.argv[1], step=number)
    print(number, flush=True)
