//! The recovery key as people write it down: 55 characters in eleven groups of five.
//!
//! 256 bits of secret and 19 bits of checksum in Crockford's base 32 (<https://www.crockford.com/base32.html>): no I, L,
//! O and U; when read, I and L count as 1, O as 0, case, spaces and hyphens do not matter.

use zeroize::Zeroizing;

use super::KeyError;

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const CHARACTERS: usize = 55;
const GROUP: usize = 5;

/// The text to print for people, once.
pub fn format_recovery_key(key: &[u8; 32]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(CHARACTERS + CHARACTERS / GROUP));
    for (place, symbol) in symbols(key).iter().enumerate() {
        if place > 0 && place % GROUP == 0 {
            text.push('-');
        }
        text.push(char::from(ALPHABET.get(usize::from(*symbol)).copied().unwrap_or(b'0')));
    }
    text
}

/// Reads what a person typed. The checksum finds every single wrong character and nearly every other mistake.
pub fn parse_recovery_key(text: &str) -> Result<Zeroizing<[u8; 32]>, KeyError> {
    let refuse = |why: String| KeyError::RecoveryKey { why };
    let mut typed = Zeroizing::new(Vec::with_capacity(CHARACTERS));
    for character in text.chars() {
        let upper = match character.to_ascii_uppercase() {
            ' ' | '\t' | '\r' | '\n' | '-' => continue,
            'O' => '0',
            'I' | 'L' => '1',
            other => other,
        };
        let symbol = ALPHABET.iter().position(|&letter| char::from(letter) == upper);
        let symbol = symbol.ok_or_else(|| refuse(format!("the character `{character}` does not occur in one")))?;
        typed.push(u8::try_from(symbol).unwrap_or(0));
        if typed.len() > CHARACTERS {
            return Err(refuse(format!("it is longer than {CHARACTERS} characters")));
        }
    }
    if typed.len() < CHARACTERS {
        return Err(refuse(format!("it has {} characters instead of {CHARACTERS}", typed.len())));
    }
    let mut key = Zeroizing::new([0u8; 32]);
    for (index, byte) in key.iter_mut().enumerate() {
        *byte = (index * 8..index * 8 + 8).fold(0, |byte, bit| byte << 1 | symbol_bit(&typed, bit));
    }
    if symbols(&key).as_slice() == typed.as_slice() {
        Ok(key)
    } else {
        Err(refuse("its checksum does not match: at least one character is wrong or two are exchanged".into()))
    }
}

/// The five-bit symbols of key and checksum.
fn symbols(key: &[u8; 32]) -> Zeroizing<[u8; CHARACTERS]> {
    let mut bytes = Zeroizing::new([0u8; 35]);
    let checksum = blake3::derive_key("strandline 2026 recovery key checksum v1", key);
    for (to, from) in bytes.iter_mut().zip(key.iter().chain(&checksum)) {
        *to = *from;
    }
    let mut symbols = Zeroizing::new([0u8; CHARACTERS]);
    for (index, symbol) in symbols.iter_mut().enumerate() {
        *symbol = (index * 5..index * 5 + 5).fold(0, |symbol, bit| {
            let byte = bytes.get(bit / 8).copied().unwrap_or(0);
            symbol << 1 | (byte >> (7 - bit % 8) & 1)
        });
    }
    symbols
}

fn symbol_bit(symbols: &[u8], bit: usize) -> u8 {
    symbols.get(bit / 5).copied().unwrap_or(0) >> (4 - bit % 5) & 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [0xa7; 32];

    #[test]
    fn a_recovery_key_reads_back_in_any_spelling() {
        for byte in 0..=255 {
            let key = [byte; 32];
            assert_eq!(*parse_recovery_key(&format_recovery_key(&key)).unwrap(), key);
        }
        let text = format_recovery_key(&KEY);
        assert_eq!(text.len(), 65);
        let sloppy = format!("  {}\n", text.to_lowercase().replace('-', " ").replace('0', "o").replace('1', "l"));
        assert_eq!(*parse_recovery_key(&sloppy).unwrap(), KEY);
    }

    #[test]
    fn every_wrong_character_is_noticed() {
        let text = format_recovery_key(&KEY);
        for place in 0..text.len() {
            for letter in ALPHABET {
                let mut typed = text.as_bytes().to_vec();
                if typed[place] == *letter || typed[place] == b'-' {
                    continue;
                }
                typed[place] = *letter;
                let error = parse_recovery_key(std::str::from_utf8(&typed).unwrap()).unwrap_err();
                assert!(error.to_string().contains("checksum"), "{error}");
            }
        }
    }

    #[test]
    fn a_key_too_short_too_long_or_with_a_foreign_character_says_so() {
        let text = format_recovery_key(&KEY);
        assert!(parse_recovery_key(&text[1..]).unwrap_err().to_string().contains("54 characters"));
        assert!(parse_recovery_key(&format!("{}7", text.as_str())).unwrap_err().to_string().contains("longer"));
        assert!(parse_recovery_key("hällo").unwrap_err().to_string().contains('ä'));
    }
}
