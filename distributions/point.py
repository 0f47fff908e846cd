"""A single number per step, for protocols that score points."""

from typing import Dict, Iterator, List, Optional, Tuple

from gluonts.core.component import validated
from gluonts.dataset.field_names import FieldName
from gluonts.dataset.loader import DataLoader
from gluonts.itertools import select
from gluonts.model.forecast import Forecast, SampleForecast
from gluonts.model.forecast_generator import ForecastGenerator, OutputTransform, make_predictions
from gluonts.torch.distributions import Output
from torch import Tensor, nn

_LOSSES = ("mse", "mae")


class PointForecastGenerator(ForecastGenerator):
    """Forecasts of one sample, which is their mean and every quantile."""

    @validated()
    def __init__(self) -> None:
        pass

    def __call__(
        self,
        inference_data_loader: DataLoader,
        prediction_net: nn.Module,
        input_names: List[str],
        output_transform: Optional[OutputTransform],
        num_samples: Optional[int],
        **kwargs: object,
    ) -> Iterator[Forecast]:
        for batch in inference_data_loader:
            inputs = select(input_names, batch, ignore_missing=True)
            (location,), loc, scale = make_predictions(prediction_net, inputs)
            points = (location * scale + loc).detach().cpu().numpy()
            for i, point in enumerate(points):
                yield SampleForecast(
                    point[None],
                    start_date=batch[FieldName.FORECAST_START][i],
                    item_id=batch[FieldName.ITEM_ID][i],
                    info=batch[FieldName.INFO][i],
                )


class PointOutput(Output):
    """A point forecast trained by squared or absolute error on the standardised scale.

    Parameters
    ----------
    loss
        ``"mse"`` or ``"mae"``.

    Raises
    ------
    ValueError
        If ``loss`` is neither.
    """

    args_dim: Dict[str, int] = {"loc": 1}

    @validated()
    def __init__(self, loss: str = "mse") -> None:
        if loss not in _LOSSES:
            raise ValueError(f"loss={loss!r} is unknown: choose one of {', '.join(_LOSSES)}")
        self.loss_name = loss

    @property
    def event_shape(self) -> Tuple[int, ...]:
        return ()

    @property
    def forecast_generator(self) -> ForecastGenerator:
        return PointForecastGenerator()

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        (loc,) = args
        return (loc.squeeze(-1),)

    def loss(
        self,
        target: Tensor,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> Tensor:
        """Error per value, same shape as ``target``, in units of ``scale``."""
        (prediction,) = distr_args
        if loc is not None:
            target = target - loc
        if scale is not None:
            target = target / scale
        error = target - prediction
        return error.square() if self.loss_name == "mse" else error.abs()
