"""Optimizers of a run, Keras's own: Adam, Muon, and the averaged weights that either may keep."""

import contextlib

import keras


class Muon(keras.optimizers.Muon):
    """Keras's Muon (Jordan et al. 2024): a step has about the rate as spectral norm; `output`, `output_rate` times it.

    Keras multiplies by the root of the larger dimension (Liu et al. 2025), and so treats both layers next to the pixels
    alike: on MNIST the encoder's does better with a lower rate than that, the decoder's with a higher one.
    """

    def __init__(self, output, output_rate, **constants):
        super().__init__(rms_rate=None, weight_decay=None, adam_weight_decay=None, **constants)
        self.output, self.output_rate = output, output_rate  # output: its index among the variables

    def update_step(self, gradient, variable, learning_rate):
        """Take the step of one variable."""
        factor = self.output_rate if self._get_variable_index(variable) == self.output else 1.0
        super().update_step(gradient, variable, learning_rate * factor)


def build_optimizer(parameters, model):
    """Keras optimizer of a run, its variables made. The learning rate is set at every step."""
    common = {"epsilon": parameters.epsilon, "use_ema": parameters.ema > 0, "ema_momentum": parameters.ema}
    if parameters.optimizer == "adam":
        optimizer = keras.optimizers.Adam(beta_1=parameters.beta_1, beta_2=parameters.beta_2, **common)
    else:
        output = [variable is model.decoder[0].head.kernel for variable in model.phi + model.theta].index(True)
        common |= {"adam_beta_1": parameters.beta_1, "adam_beta_2": parameters.beta_2, "momentum": parameters.momentum}
        optimizer = Muon(output, parameters.output_rate or 1.0, **common)
    optimizer.build(model.phi + model.theta)
    # Keras would add up over replicas what is a sum already, and after the clip; it has no public switch for that.
    optimizer._all_reduce_sum_gradients = list
    return optimizer


def values_of(variables):
    """The arrays that variables hold."""
    return [variable.numpy() for variable in variables]


def assign(variables, values):
    """Give variables these values."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


@contextlib.contextmanager
def averaged_weights(model, optimizer):
    """While open, the model has the averaged weights, if the optimizer keeps them."""
    variables = model.phi + model.theta
    current = values_of(variables)
    optimizer.finalize_variable_values(variables)  # without `ema` they stay
    yield
    assign(variables, current)
