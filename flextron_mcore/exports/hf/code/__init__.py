"""Model code that travels inside exported directories (`auto_map`). It needs transformers only, 4.57 or newer, and is loaded from
there with trust_remote_code=True; nothing in flextron_mcore imports it. A directory carries one family's files, so what the
families' files repeat is meant."""
