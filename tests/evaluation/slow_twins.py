"""The model asked from the definition: one request at a time, all logits, no cache; and models."""

import torch
from models_for_tests import small_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_llm.scoring import unwrapped

# float32 sums in another order; log-probabilities are near -6 here.
CLOSE = {"rtol": 0, "atol": 1e-5}


def slow_logps(model, encoder, request):
    """Log-probabilities and first choices of the answer's tokens."""
    encoded = encoder.pairs([request.question], [request.answer])[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0].double()
    logps, greedy = [], []
    for position in range(encoded.n_prompt, len(encoded.ids)):
        before = torch.log_softmax(logits[position - 1], dim=-1)
        logps.append(before[encoded.ids[position]].item())
        greedy.append(before.argmax().item() == encoded.ids[position])
    return logps, greedy


def slow_ids(model, encoder, question, limit):
    """Greedy tokens with the end token, one full forward pass per token."""
    ids = encoder.prompts([question])[0]
    new = []
    while len(new) < limit and encoder.tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return new


def slow_generation(model, encoder, question, limit):
    """The text of these tokens, and whether it ended by itself."""
    ids = slow_ids(model, encoder, question, limit)
    finished = encoder.tokenizer.eos_token_id in ids
    kept = ids[:-1] if finished else ids
    return encoder.tokenizer.decode(kept, skip_special_tokens=True).strip(), finished


def lean_towards_the_end(model, by):
    """Make the model end its answers now and then: its end token gets more likely."""
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[inner.config.eos_token_id] = by


def tiny_of(model_type, attention="sdpa", words=None, **settings):
    """Two layers with random weights, of any architecture, for the tokenizer of the tests."""
    tokenizer = small_tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
    }
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": 0}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=words or len(tokenizer),
        initializer_range=0.3,  # so that a token minds its neighbours
        **sizes,
        **{f"{name}_token_id": number for name, number in ids.items()},
        **settings,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
