"""What GPT-NeoX and GPT-J share: the way from tokens through the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neox_kernels import RotaryEmbedding
from neox_kernels.models.base import PretrainedModel
from neox_kernels.models.cache import KVCache
from neox_kernels.models.forward import Forward, may_look, require_head_mask, require_integers, require_mask
from neox_kernels.models.outputs import DecoderOutput


class Decoder(PretrainedModel):
    """A model without a head. A family's class names its modules, makes them, and makes its layers."""

    # Names of the modules, which are those of the family's checkpoints.
    embedding_name: ClassVar[str]
    dropout_name: ClassVar[str]
    layers_name: ClassVar[str]
    norm_name: ClassVar[str]
    interleaved: ClassVar[bool]
    rotary_class: ClassVar[type[RotaryEmbedding]] = RotaryEmbedding
    adds_token_types: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config = self.config
        self.rotary_emb = self.rotary_class(
            config.rotary_dim_of_head,
            config.max_position_embeddings,
            config.rotary_base,
            config.rope_scaling,
            interleaved=self.interleaved,
        )
        self.gradient_checkpointing = False
        self._attn_implementation = "auto"
        self._devices: list[torch.device] | None = None  # of each layer, where they are spread

    @property
    def decoder(self) -> Decoder:
        return self

    @property
    def layers_in_order(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self, self.layers_name)
        return layers

    def get_input_embeddings(self) -> nn.Embedding:
        embedding: nn.Embedding = getattr(self, self.embedding_name)
        return embedding

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        setattr(self, self.embedding_name, embedding)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: Tensor | Sequence[Tensor | None] | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> DecoderOutput | tuple[Any, ...]:
        """Run the layers.

        Args:
            input_ids: (batch, seqlen), integers; or ``inputs_embeds``, (batch, seqlen, hidden_size).
            attention_mask: (batch, cached + seqlen), 1 or True for the tokens to see, padding anywhere; or, of four
                dimensions and broadcastable to (batch, nheads, seqlen, cached + seqlen), bool (True: seen) or floating
                (added to the scores), which then takes the place of the causal rule.
            position_ids: (batch or 1, seqlen); default: counted from the tokens in the cache, padding included.
            head_mask: (nheads,) or (num_hidden_layers, nheads), what each head's probabilities are multiplied with.
            past_key_values: a cache to continue, which is changed; or (key, value) of each layer as older code had it.
            use_cache: keep keys and values, in ``past_key_values`` of the output; default: the configuration's,
                but not in training with gradient checkpointing.
            output_attentions, output_hidden_states, return_dict: default: the configuration's.
            token_type_ids: (batch, seqlen), whose embeddings GPT-J adds; GPT-NeoX takes no notice of them.

        Raises:
            ValueError, TypeError: inputs that do not go together, or more tokens than the cache or the model can hold;
                nothing is changed.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self._embed("input_ids", input_ids)
        elif not isinstance(inputs_embeds, Tensor):
            raise TypeError(f"inputs_embeds must be a tensor, not a {type(inputs_embeds).__name__}")
        elif inputs_embeds.dtype != self.dtype and not torch.is_autocast_enabled(inputs_embeds.device.type):
            raise TypeError(f"inputs_embeds must be {self.dtype} like the model, not {inputs_embeds.dtype}")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be (batch, seqlen, {config.hidden_size}), not of shape "
                f"{tuple(inputs_embeds.shape)}"
            )
        hidden: Tensor = inputs_embeds
        batch, seqlen, _ = hidden.shape
        if token_type_ids is not None and self.adds_token_types:
            hidden = hidden + self._embed("token_type_ids", token_type_ids, (batch, seqlen), (1, seqlen))

        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        cache = self._cache(past_key_values, use_cache, checkpointing)
        if cache is not None:
            cache.require_room(batch, seqlen, config.num_hidden_layers)
        start = 0 if cache is None else cache.length
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        keep_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        nheads = config.num_attention_heads
        length = self._length(position_ids, batch, seqlen, start)
        attention_mask = require_mask(attention_mask, (batch, nheads, seqlen, start + seqlen), hidden.dtype)
        heads = require_head_mask(head_mask, config.num_hidden_layers, nheads, hidden.dtype)
        hidden = getattr(self, self.dropout_name)(hidden)
        tables, position_ids = self._tables(hidden, position_ids, start)
        shared = Forward(
            rotary=self.rotary_emb,
            tables=tables,
            length=length,
            position_ids=position_ids,
            attention_mask=attention_mask,
            q_len=seqlen,
            k_len=start + seqlen,
            head_mask=heads,
            cache=cache,
            implementation=self.attn_implementation,
            output_attentions=output_attentions,
        )
        kept = []
        for i, layer in enumerate(self.layers_in_order):
            if self._devices is not None:
                hidden = hidden.to(self._devices[i])
            if keep_hidden:
                kept.append(hidden)
            given = checkpoint(layer, hidden, shared, use_reentrant=False) if checkpointing else layer(hidden, shared)
            hidden = given[0] if isinstance(given, tuple) else given
        hidden = getattr(self, self.norm_name)(hidden)
        if cache is not None:
            cache.advance(seqlen)
        output = DecoderOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*kept, hidden) if keep_hidden else None,
            attentions=tuple(shared.attentions[i] for i in sorted(shared.attentions)) if output_attentions else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _embed(self, name: str, ids: object, *shapes: tuple[int, ...]) -> Tensor:
        ids = require_integers(name, ids, *shapes)
        if ids.dim() != 2:
            raise ValueError(f"{name} must be (batch, seqlen), not of shape {tuple(ids.shape)}")
        embedding = self.get_input_embeddings()
        try:
            embedded: Tensor = embedding(ids.to(next(embedding.parameters()).device))
        except IndexError:  # seen on a CPU only
            low, high = (int(x) for x in ids.aminmax())
            tokens = self.config.vocab_size
            raise IndexError(f"{name} must be between 0 and {tokens - 1}, not between {low} and {high}") from None
        return embedded

    @property
    def is_spread(self) -> bool:
        """Whether :meth:`parallelize` was called."""
        return self._devices is not None

    @property
    def last_device(self) -> torch.device:
        """Where the last hidden state is."""
        parameter = next(getattr(self, self.norm_name).parameters())
        device: torch.device = parameter.device
        return device

    def parallelize(self, device_map: Mapping[Any, Sequence[int]] | None = None) -> None:
        """Spread the layers over devices; hidden states move between them.

        Args:
            device_map: the layers of each device, every layer once; what comes before the layers goes to the first
                one's device, what comes behind them to the last one's. Default: as even as can be over all GPUs.
        """
        layers = self.layers_in_order
        if device_map is None:
            count = torch.cuda.device_count()
            if count == 0:
                raise ValueError("device_map must be given where there is no GPU")
            share = -(-len(layers) // count)
            device_map = {f"cuda:{i}": range(len(layers))[i * share : (i + 1) * share] for i in range(count)}
        named = sorted(i for rows in device_map.values() for i in rows)
        if named != list(range(len(layers))) or not named:
            raise ValueError(f"device_map must name each of the {len(layers)} layers once, not {named}")
        devices = {i: torch.device(device) for device, rows in device_map.items() for i in rows}
        self._devices = [devices[i] for i in range(len(layers))]
        for layer, device in zip(layers, self._devices, strict=True):
            layer.to(device)
        self.get_input_embeddings().to(self._devices[0])
        getattr(self, self.norm_name).to(self._devices[-1])

    def deparallelize(self) -> None:
        """Put everything back onto the CPU."""
        self._devices = None
        self.to("cpu")

    def _cache(
        self, past: KVCache | Sequence[tuple[Tensor, Tensor]] | None, use_cache: bool | None, checkpointing: bool
    ) -> KVCache | None:
        if checkpointing:
            if past is not None or use_cache:
                raise ValueError("past_key_values and use_cache=True do not go together with gradient checkpointing")
            return None
        if past is None:
            return KVCache() if (self.config.use_cache if use_cache is None else use_cache) else None
        return past if isinstance(past, KVCache) else KVCache.from_tuple(past)

    def _tables(
        self, hidden: Tensor, position_ids: Tensor | None, start: int
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """Tables that are not ``rotary_emb``'s own, and their rows in place of ``position_ids``."""
        return None, position_ids

    def _length(self, position_ids: Tensor | None, batch: int, seqlen: int, start: int) -> int:
        """How many positions the tables must hold."""
        limit: int = self.config.max_position_embeddings
        if position_ids is None:
            length = start + seqlen
        else:
            require_integers("position_ids", position_ids, (batch, seqlen), (1, seqlen))
            if not may_look(position_ids):
                return limit
            if position_ids.numel() and int(position_ids.min()) < 0:
                raise IndexError(f"position_ids must not be negative, not {int(position_ids.min())}")
            length = int(position_ids.max()) + 1 if position_ids.numel() else 0
        if length > limit and self.config.limits_positions:
            raise ValueError(
                f"{length} positions are more than the {limit} of the configuration's max_position_embeddings"
            )
        return length
