"""Layers shared by models and encoders: masks, attention, transformers, convolutions, LSTM, dropout."""

from avjax.layers.attention import SelfAttention, attend
from avjax.layers.conformer import ConformerBlock, StepNorm, interleaved_sinusoids, pack, unpack
from avjax.layers.conv2d import FrameConvolution, halved
from avjax.layers.crossmodal import CrossmodalEncoder
from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project, TimeConvolution
from avjax.layers.lstm import LstmEncoder, Recurrence
from avjax.layers.masking import (
    align,
    causal,
    last_step,
    masked_max,
    masked_mean,
    masked_softmax,
    positions,
    stream_inputs,
    turns,
    zero_masked,
)
from avjax.layers.transformer import CrossBlock, PostNormBlock, PreNormBlock, sinusoids
