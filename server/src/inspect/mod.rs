//! `strand-server inspect`: what is in one file of the storage, field by field, as docs/FORMAT.md describes it. Needs no key, no
//! lock and no other file; what is sealed stays sealed. Damaged bytes are told with their offsets, and end no process.
//!
//! Memory: one file, of packs one block and the footer; and the fields, about 150 bytes each.

mod pack;
mod single;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;
use data_encoding::HEXLOWER;
use jiff::Timestamp;
use serde::Serialize;

/// What a file is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A pack: header, list of blocks, footer; reads every block.
    Pack,
    /// A block: header and chunk table.
    Block,
    /// A block of trees: the same with what each tree refers to.
    Tree,
    /// A snapshot's manifest.
    Manifest,
    /// A snapshot's receipt.
    Receipt,
    /// A key slot.
    Slot,
    /// A repository file.
    Repository,
    /// A pack's state file.
    State,
}

/// A file, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// What it was taken for.
    pub kind: &'static str,
    /// Its fields in the order of their offsets.
    pub fields: Vec<Field>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// One field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Where it begins, bytes from the start of the file.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// Its name.
    pub name: String,
    /// What it says.
    pub value: String,
}

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Where, bytes from the start of the file.
    pub offset: u64,
    /// What, for people.
    pub what: String,
}

/// Takes apart what lies at `offset` of `path`. An error means that the file could not be read at all.
pub fn inspect(kind: Kind, path: &Path, offset: u64) -> anyhow::Result<Inspection> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let metadata = file.metadata().with_context(|| format!("cannot read {}", path.display()))?;
    anyhow::ensure!(metadata.is_file(), "{} is not a file", path.display());
    match kind {
        Kind::Pack => pack::pack(&file, path),
        Kind::Block => pack::block(&file, path, offset, false),
        Kind::Tree => pack::block(&file, path, offset, true),
        Kind::State => Ok(pack::state(&bytes_of(&file, path, offset)?, offset)),
        Kind::Manifest => Ok(single::manifest(&bytes_of(&file, path, offset)?, offset, path)),
        Kind::Receipt => Ok(single::receipt(&bytes_of(&file, path, offset)?, offset)),
        Kind::Slot => Ok(single::slot(&bytes_of(&file, path, offset)?, offset)),
        Kind::Repository => Ok(single::repository(&bytes_of(&file, path, offset)?, offset)),
    }
}

/// Longest file that is read whole, bytes: a state file of a full pack.
const FILE_BYTES_MAX: u64 = 256 << 20;

fn bytes_of(mut file: &File, path: &Path, offset: u64) -> anyhow::Result<Vec<u8>> {
    let cannot = || format!("cannot read {}", path.display());
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(offset)).with_context(cannot)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).with_context(cannot)?;
    Ok(bytes)
}

/// `FILE@OFFSET` in its parts. A file whose name really ends like that is meant as it is.
pub fn split_offset(text: &str) -> (PathBuf, u64) {
    let whole = PathBuf::from(text);
    if whole.exists() {
        return (whole, 0);
    }
    let parts = text.rsplit_once('@').and_then(|(path, offset)| {
        let offset = match offset.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok()?,
            None => offset.parse().ok()?,
        };
        Some((PathBuf::from(path), offset))
    });
    parts.unwrap_or((whole, 0))
}

/// Reads fields off bytes and notes each. Every method returns nothing when the bytes end, after noting that.
struct Walker<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where `bytes` begin in the file.
    base: u64,
    found: Inspection,
}

impl<'a> Walker<'a> {
    fn new(kind: &'static str, bytes: &'a [u8], base: u64) -> Self {
        let found = Inspection { kind, fields: Vec::new(), problems: Vec::new() };
        Self { bytes, at: 0, base, found }
    }

    /// Where the next field begins in the file.
    fn offset(&self) -> u64 {
        self.base + self.at as u64
    }

    fn problem(&mut self, offset: u64, what: impl Into<String>) {
        self.found.problems.push(Problem { offset, what: what.into() });
    }

    fn note(&mut self, offset: u64, bytes: usize, name: &str, value: String) {
        self.found.fields.push(Field { offset, bytes: bytes as u64, name: name.to_owned(), value });
    }

    /// The next `n` bytes, shown by `show`.
    fn take(&mut self, name: &str, n: usize, show: impl FnOnce(&[u8]) -> String) -> Option<&'a [u8]> {
        let (offset, left) = (self.offset(), self.bytes.len() - self.at.min(self.bytes.len()));
        let Some(taken) = self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end)) else {
            self.problem(offset, format!("it ends early: `{name}` needs {n} bytes, {left} are left"));
            return None;
        };
        self.at += n;
        self.note(offset, n, name, show(taken));
        Some(taken)
    }

    fn hex(&mut self, name: &str, n: usize) -> Option<&'a [u8]> {
        self.take(name, n, |bytes| HEXLOWER.encode(bytes))
    }

    /// Bytes that only a key holder can read.
    fn sealed(&mut self, name: &str, n: usize) -> Option<&'a [u8]> {
        self.take(name, n, |bytes| format!("{} bytes, sealed: readable only with the key", bytes.len()))
    }

    fn magic(&mut self, magic: [u8; 8]) -> Option<()> {
        let offset = self.offset();
        let found = self.take("magic", 8, |bytes| bytes.escape_ascii().to_string())?;
        if found == magic {
            return Some(());
        }
        self.problem(offset, format!("the magic is not `{}`: this is something else", magic.escape_ascii()));
        None
    }

    fn version(&mut self, known: u16) -> Option<()> {
        let offset = self.offset();
        let version = self.u16("version")?;
        if version == known {
            return Some(());
        }
        self.problem(offset, format!("version {version} is not known; this program knows {known}"));
        None
    }

    fn number<const N: usize>(&mut self, name: &str, show: impl FnOnce(u64) -> String) -> Option<u64> {
        let mut value = 0;
        self.take(name, N, |bytes| {
            value = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
            show(value)
        })?;
        Some(value)
    }

    /// A byte that names one of `names`, the first of which is value `from`.
    fn choice(&mut self, name: &str, from: u8, names: &[&str]) -> Option<u8> {
        let (offset, mut known) = (self.offset(), false);
        let value = self.number::<1>(name, |value| {
            let named = usize::try_from(value).ok().and_then(|value| names.get(value.checked_sub(from.into())?));
            known = named.is_some();
            named.map_or_else(|| format!("{value}, unknown"), |named| format!("{value}, {named}"))
        })?;
        if !known {
            self.problem(offset, format!("`{name}` has a value that is not known"));
        }
        u8::try_from(value).ok()
    }

    fn u16(&mut self, name: &str) -> Option<u16> {
        self.number::<2>(name, |value| value.to_string()).and_then(|value| value.try_into().ok())
    }

    fn u32(&mut self, name: &str) -> Option<u32> {
        self.number::<4>(name, |value| value.to_string()).and_then(|value| value.try_into().ok())
    }

    fn u64(&mut self, name: &str) -> Option<u64> {
        self.number::<8>(name, |value| value.to_string())
    }

    /// Nanoseconds since 1970.
    fn time(&mut self, name: &str) -> Option<u64> {
        self.number::<8>(name, |value| {
            let ns = value.cast_signed();
            Timestamp::from_nanosecond(ns.into())
                .map_or_else(|_| format!("{ns} ns"), |time| format!("{time} ({ns} ns)"))
        })
    }

    fn zeros(&mut self, n: usize) -> Option<()> {
        let offset = self.offset();
        let bytes = self.hex("zero", n)?;
        if bytes.iter().any(|&byte| byte != 0) {
            self.problem(offset, "these bytes must be zero");
        }
        Some(())
    }

    /// An unsigned LEB128 integer.
    fn leb(&mut self, name: &str) -> Option<u64> {
        let (offset, rest) = (self.offset(), self.bytes.get(self.at..).unwrap_or_default());
        let length = rest.iter().take(10).position(|byte| byte & 0x80 == 0).map(|last| last + 1);
        let Some(length) = length else {
            self.problem(offset, format!("`{name}` is no number: it does not end within ten bytes"));
            return None;
        };
        let value = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |value, byte| value << 7 | u64::from(byte & 0x7f));
        self.take(name, length, |bytes| value(bytes).to_string()).map(value)
    }

    /// The length of a string, refused above `max`.
    fn length(&mut self, name: &str, max: usize) -> Option<usize> {
        let offset = self.offset();
        let length = self.leb(name)?;
        if length > max as u64 {
            self.problem(offset, format!("`{name}` is {length}, more than the limit {max}"));
            return None;
        }
        usize::try_from(length).ok()
    }

    fn text(&mut self, name: &str, max: usize) -> Option<()> {
        let length = self.length(&format!("length of {name}"), max)?;
        let offset = self.offset();
        let bytes = self.take(name, length, |bytes| format!("{:?}", String::from_utf8_lossy(bytes)))?;
        if std::str::from_utf8(bytes).is_err() {
            self.problem(offset, format!("`{name}` is not UTF-8"));
        }
        Some(())
    }

    /// A BLAKE3 digest of everything since `from` (a position in these bytes).
    fn digest(&mut self, name: &str, from: usize) -> Option<()> {
        let covered = self.bytes.get(from..self.at).unwrap_or_default();
        let (offset, right) = (self.offset(), blake3::hash(covered));
        let stored = self.hex(name, 32)?;
        if stored != right.as_bytes() {
            self.problem(offset, format!("the digest does not match: bytes of these {} are damaged", covered.len()));
        }
        Some(())
    }

    /// Notes bytes that are left over.
    fn finish(mut self) -> Inspection {
        let left = self.bytes.len().saturating_sub(self.at);
        if left > 0 && self.found.problems.is_empty() {
            self.problem(self.offset(), format!("{left} bytes are left over behind the last field"));
        }
        self.found
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
