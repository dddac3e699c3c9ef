//! The wire protocol: frames, control messages, data frames. `docs/PROTOCOL.md` is the byte-exact description.
