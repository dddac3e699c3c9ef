//! The only place that names `bincode`: fixed-width little-endian integers, u64 lengths, u32 enum tags, no trailing bytes.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::WireError;
use crate::limits;

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Fixint,
    bincode::config::Limit<{ limits::CONTROL_BYTES_MAX }>,
> = bincode::config::standard().with_fixed_int_encoding().with_limit::<{ limits::CONTROL_BYTES_MAX }>();

/// Appends the encoding of `value`. Fails if it would exceed the control frame limit.
pub fn encode<T: Serialize>(what: &'static str, value: &T, out: &mut Vec<u8>) -> Result<(), WireError> {
    let written = bincode::serde::encode_into_std_write(value, out, CONFIG)
        .map_err(|error| WireError::Malformed { what, why: error.to_string() })?;
    if written > limits::CONTROL_BYTES_MAX {
        return Err(WireError::Malformed { what, why: format!("{written} bytes exceed the limit of a control frame") });
    }
    Ok(())
}

/// Decodes all of `bytes`. Allocations are bounded by the control frame limit, whatever lengths the bytes claim.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    let malformed = |why: String| WireError::Malformed { what, why };
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|error| malformed(error.to_string()))?;
    match bytes.len() - used {
        0 => Ok(value),
        extra => Err(malformed(format!("{extra} bytes too many"))),
    }
}
