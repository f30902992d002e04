"""Linear classifier on frozen features, fitted within seconds on the device of the features."""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ITERATIONS = 50  # maximum number of L-BFGS iterations
WEIGHT_DECAY = 1e-4  # weight of the L2 penalty, which is added to the mean cross entropy


def predict(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, num_classes: int
) -> Tensor:
    """Classify images by multinomial logistic regression.

    Features are standardized with the mean and standard deviation of the training features and
    divided by the square root of their dimension, so the same weight decay suits all widths.
    L-BFGS starts from zero and uses a line search. The fit draws no random numbers, and no gradient
    reaches the features.

    Args:
        train_features: Features in any precision, shape (num_train, dim).
        train_labels: Classes in [0, num_classes), shape (num_train,).
        test_features: Features in any precision, shape (num_test, dim).
        num_classes: Number of classes.

    Returns:
        Predicted classes, int64, shape (num_test,).
    """
    train, test = train_features.detach().float(), test_features.detach().float()
    std, mean = torch.std_mean(train, dim=0, correction=0)
    is_informative = std > 1e-6 * std.max().clamp(min=1e-30)  # False for constant features
    scale = torch.where(is_informative, 1 / std, 0.0) * train.shape[1] ** -0.5
    train, test = (
        F.pad((features - mean) * scale, (0, 1), value=1.0) for features in (train, test)
    )
    weights = train.new_zeros(train.shape[1], num_classes).requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        with torch.enable_grad():
            penalty = WEIGHT_DECAY / 2 * weights[:-1].square().sum()  # the bias is not decayed
            loss = F.cross_entropy(train @ weights, train_labels) + penalty
            (weights.grad,) = torch.autograd.grad(loss, weights)
        return loss

    solver.step(closure)
    return (test @ weights.detach()).argmax(dim=1)
