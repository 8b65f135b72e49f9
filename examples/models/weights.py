"""Reading the weights of a Hugging Face folder, and loading weights into a model."""

import pathlib

from mindspore import Tensor

from mindpet.files.tensors import TensorFile


def read_folder(folder):
    """The weights in the `model*.safetensors` of a folder, by their names.

    Returns:
        dict of str -> numpy.ndarray.

    Raises:
        OSError: there is no `model*.safetensors` in the folder.
        ValueError: a file is damaged.
    """
    files = sorted(pathlib.Path(folder).glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model*.safetensors in this folder")
    return {name: value for file in files for name, value in TensorFile(file).read_all().items()}


def load_weights(model, weights):
    """Load weights into a model. What the deltas have added to the model keeps its values.

    Args:
        model (Cell): the model.
        weights (dict): name -> numpy.ndarray; more than the model has is allowed, say heads of a pretraining task.

    Raises:
        ValueError: a weight is missing or has another shape; all of them are listed, and the model is unchanged.
    """
    params = {name: param for name, param in model.parameters_and_names() if "mindpet_delta" not in name}
    problems = [f"missing: {name} {param.shape}" for name, param in params.items() if name not in weights]
    problems += [
        f"{name}: {param.shape} in the model, {weights[name].shape} in the file"
        for name, param in params.items()
        if name in weights and param.shape != weights[name].shape
    ]
    if problems:
        raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(problems))
    for name, param in params.items():
        param.set_data(Tensor(weights[name]).astype(param.dtype))
