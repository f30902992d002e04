"""Pictures show the channels that `log.bands` names, and impossible ones are refused."""

import pytest
import torch

from ssl_pretrain import config
from ssl_pretrain.monitoring.image_grids import neighbor_grid, view_grid
from ssl_pretrain.monitoring.shown_bands import describe, to_rgb
from ssl_pretrain.schema.config_file import ConfigError
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import Crop, ViewsConfig

SHOWN = {  # channels, bands: the shown bands as red, green, blue (None is black), and their text
    (1, ()): ((0, 0, 0), ""),
    (2, ()): ((0, 1, None), "bands 0, 1 as red, green"),
    (3, ()): ((0, 1, 2), ""),
    (13, ()): ((0, 1, 2), "bands 0, 1, 2 as red, green, blue"),
    (3, (2, 1, 0)): ((2, 1, 0), "bands 2, 1, 0 as red, green, blue"),
    (13, (12, 7, 3)): ((12, 7, 3), "bands 12, 7, 3 as red, green, blue"),
    (13, (12, 7)): ((12, 7, None), "bands 12, 7 as red, green"),
    (13, (12,)): ((12, 12, 12), "band 12 in gray"),
}


@pytest.mark.parametrize(("channels", "bands"), SHOWN)
def test_the_chosen_bands_are_red_green_and_blue(channels, bands):
    images = torch.rand(2, channels, 5, 4, generator=torch.Generator().manual_seed(0))
    shown, text = SHOWN[channels, bands]
    black = torch.zeros(2, 5, 4)
    expected = [black if band is None else images[:, band] for band in shown]
    assert torch.equal(to_rgb(images, bands), torch.stack(expected, dim=1))
    assert describe(bands, channels) == text


def test_grids_of_views_and_of_neighbors_show_the_chosen_bands():
    images = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 8, 8) / 10
    views = ViewsConfig({"global": Crop(count=1, size=8)}, [0.0] * 4, [1.0] * 4)
    batch = Batch([images], torch.arange(1), torch.arange(1), [])
    grid = view_grid(batch, views, [3, 2, 1])
    torch.testing.assert_close(grid[:, 5, 5], torch.tensor([0.3, 0.2, 0.1]))
    pixels = (images * 255).round().byte()
    grid = neighbor_grid(pixels, pixels[:, None], torch.tensor([[True]]), [3, 2, 1])
    torch.testing.assert_close(255 * grid[:, 9, 9], torch.tensor([76.0, 51.0, 26.0]))


REFUSED = {  # channels, bands: message
    (4, "[0,1,2,3]"): "log.bands: [0, 1, 2, 3] has 4 bands; give three for red, green and blue, "
    "two for red and green, or one for gray",
    (4, "[4,2,1]"): "log.bands: [4, 2, 1] contains band 4, and images of 4 channels "
    "(data.channels) have bands 0 to 3; leave log.bands empty, or give bands of the images, "
    "counted from 0",
    (1, "[1]"): "log.bands: [1] contains band 1, and images of 1 channel (data.channels) have "
    "only band 0; leave log.bands empty, or give bands of the images, counted from 0",
    (4, "[-1]"): "log.bands: [-1] contains band -1, and images of 4 channels (data.channels) have "
    "bands 0 to 3; leave log.bands empty, or give bands of the images, counted from 0",
}


@pytest.mark.parametrize(("channels", "bands"), REFUSED)
def test_bands_that_the_images_do_not_have_are_refused(channels, bands):
    with pytest.raises((ConfigError, ValueError)) as error:
        config.load("simclr_digits", [f"data.channels={channels}", f"log.bands={bands}"])
    assert str(error.value).endswith(REFUSED[channels, bands])
