//! Zip archives, written without seeking: sizes and checksums follow each file's content, zip64 where it is needed.
//!
//! Written here because no crate both takes names of any bytes and keeps the central directory out of memory: it waits in
//! a temporary file. Source: PKWARE's APPNOTE.TXT 6.3.10; extra fields `UT` (time) and `ux` (owner) of Info-ZIP.
//! Zip knows no hard links (each name is a file of its own), no devices, pipes and sockets, no extended attributes.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flate2::write::DeflateEncoder;
use flate2::{Compression, Crc};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::item::{Item, Kind, Spread};
use super::{ExportError, Sink, Taken, for_people, put};

const LOCAL: u32 = 0x0403_4b50;
const DESCRIPTOR: u32 = 0x0807_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;
/// The version that knows zip64.
const VERSION: u16 = 45;
/// "Made by" Unix: external attributes hold the mode.
const MADE_BY: u16 = (3 << 8) | VERSION;
const FLAG_DESCRIPTOR: u16 = 1 << 3;
const FLAG_UTF8: u16 = 1 << 11;
const DEFLATED: u16 = 8;
/// From this size on a file's sizes take eight bytes: what does not compress grows a little.
const LARGE: u64 = 0xf000_0000;
const U32_MAX: u64 = u32::MAX as u64;

pub(super) struct Zip<'a> {
    out: &'a mut dyn Write,
    offset: u64,
    temporary: PathBuf,
    directory: Option<BufWriter<File>>,
    entries: u64,
    entry: Option<Entry>,
    /// Made once: it is large.
    deflate: DeflateEncoder<Vec<u8>>,
}

/// What the central directory will say of an entry.
struct Entry {
    name: Vec<u8>,
    flags: u16,
    method: u16,
    dos_time: [u16; 2],
    extra: Vec<u8>,
    crc: Crc,
    compressed: u64,
    size: u64,
    external: u32,
    offset: u64,
    large: bool,
    spread: Option<Spread>,
}

impl<'a> Zip<'a> {
    pub(super) fn new(out: &'a mut dyn Write, temporary: &Path) -> Self {
        // Deflate is what every reader knows; its fast levels lose little, and whoever wants small archives packs a tar.
        let deflate = DeflateEncoder::new(Vec::new(), Compression::fast());
        Self { out, offset: 0, temporary: temporary.to_owned(), directory: None, entries: 0, entry: None, deflate }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.offset += bytes.len() as u64;
        put(self.out, bytes)
    }

    /// Bytes of the file itself, to be compressed.
    fn deflate(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        let Some(entry) = &mut self.entry else { return Ok(()) };
        entry.crc.update(bytes);
        entry.size += bytes.len() as u64;
        self.deflate.write_all(bytes).map_err(ExportError::Output)?;
        self.drain()
    }

    fn drain(&mut self) -> Result<(), ExportError> {
        let packed = std::mem::take(self.deflate.get_mut());
        self.packed(packed)
    }

    fn packed(&mut self, mut packed: Vec<u8>) -> Result<(), ExportError> {
        if let Some(entry) = &mut self.entry {
            entry.compressed += packed.len() as u64;
        }
        self.write(&packed)?;
        packed.clear();
        // Gives the room back to the encoder.
        *self.deflate.get_mut() = packed;
        Ok(())
    }

    /// The end of a deflated file: what is left in the encoder, then checksum and sizes.
    fn close_deflated(&mut self) -> Result<(), ExportError> {
        let tail = self.deflate.reset(Vec::new()).map_err(ExportError::Output)?;
        self.packed(tail)?;
        let Some(entry) = &self.entry else { return Ok(()) };
        let mut descriptor = Fields::default();
        descriptor.u32(DESCRIPTOR).u32(entry.crc.sum());
        if entry.large {
            descriptor.u64(entry.compressed).u64(entry.size);
        } else if let (Ok(compressed), Ok(size)) = (u32::try_from(entry.compressed), u32::try_from(entry.size)) {
            descriptor.u32(compressed).u32(size);
        } else {
            // The content is cut to the size that was announced.
            let why = "it is longer than it was announced";
            return Err(ExportError::DoesNotFit { path: for_people(&entry.name), why });
        }
        self.write(&descriptor.0)
    }

    fn remember(&mut self, entry: &Entry) -> Result<(), ExportError> {
        let directory = match &mut self.directory {
            Some(directory) => directory,
            empty => {
                let file = tempfile::tempfile_in(&self.temporary).map_err(ExportError::Temporary)?;
                empty.insert(BufWriter::new(file))
            }
        };
        self.entries += 1;
        directory.write_all(&entry.central()).map_err(ExportError::Temporary)
    }
}

impl Sink for Zip<'_> {
    const HARD_LINKS: bool = false;

    fn begin(&mut self, item: Item) -> Result<Taken, ExportError> {
        // Unlike tar, zip has no name for the directory in which an archive is unpacked.
        if item.path == b"." {
            return Ok(Taken::Unneeded);
        }
        let kind_bits: u32 = match &item.kind {
            Kind::File { .. } => 0o100_000,
            Kind::Directory => 0o040_000,
            Kind::Symlink(_) => 0o120_000,
            Kind::Fifo => return Ok(Taken::No("zip archives hold no pipes")),
            Kind::Socket => return Ok(Taken::No("zip archives hold no sockets")),
            Kind::CharDevice(..) | Kind::BlockDevice(..) => return Ok(Taken::No("zip archives hold no devices")),
            Kind::HardLink(_) => return Ok(Taken::No("zip archives hold no hard links")),
        };
        let mut entry = Entry::new(&item, self.offset);
        entry.external =
            ((kind_bits | u32::from(item.mode)) << 16) | u32::from(matches!(item.kind, Kind::Directory)) << 4;
        if entry.name.len() > usize::from(u16::MAX) {
            return Ok(Taken::No("zip archives hold no paths longer than 65,535 bytes"));
        }
        if let Kind::Symlink(target) = &item.kind {
            entry.crc.update(target);
            (entry.size, entry.compressed) = (target.len() as u64, target.len() as u64);
        }
        if let Kind::File { size, holes } = &item.kind {
            entry.flags |= FLAG_DESCRIPTOR;
            entry.method = DEFLATED;
            entry.large = *size >= LARGE;
            entry.spread = Some(Spread::new(*size, holes.clone()));
        }
        self.write(&entry.local())?;
        if let Kind::Symlink(target) = &item.kind {
            self.write(target)?;
        }
        self.entry = Some(entry);
        Ok(Taken::Yes)
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        let Some(mut spread) = self.entry.as_mut().and_then(|entry| entry.spread.take()) else { return Ok(()) };
        spread.feed(bytes, |bytes| self.deflate(bytes))?;
        if let Some(entry) = &mut self.entry {
            entry.spread = Some(spread);
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), ExportError> {
        if let Some(spread) = self.entry.as_mut().and_then(|entry| entry.spread.take()) {
            spread.finish(|bytes| self.deflate(bytes))?;
            self.close_deflated()?;
        }
        match self.entry.take() {
            Some(entry) => self.remember(&entry),
            None => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        let start = self.offset;
        if let Some(directory) = self.directory.take() {
            let mut file = directory.into_inner().map_err(|error| ExportError::Temporary(error.into_error()))?;
            file.seek(SeekFrom::Start(0)).map_err(ExportError::Temporary)?;
            self.offset += io::copy(&mut file, self.out).map_err(ExportError::Output)?;
        }
        let bytes = self.offset - start;
        let mut end = Fields::default();
        if self.entries >= u64::from(u16::MAX) || bytes >= U32_MAX || start >= U32_MAX {
            end.u32(END_64).u64(44).u16(MADE_BY).u16(VERSION).u32(0).u32(0);
            end.u64(self.entries).u64(self.entries).u64(bytes).u64(start);
            end.u32(LOCATOR_64).u32(0).u64(self.offset).u32(1);
        }
        let entries = u16::try_from(self.entries).unwrap_or(u16::MAX);
        end.u32(END).u16(0).u16(0).u16(entries).u16(entries).u32(capped(bytes)).u32(capped(start)).u16(0);
        self.write(&end.0)
    }
}

impl Entry {
    fn new(item: &Item, offset: u64) -> Self {
        let mut name = item.path.clone();
        if matches!(item.kind, Kind::Directory) {
            name.push(b'/');
        }
        let flags = if std::str::from_utf8(&name).is_ok() { FLAG_UTF8 } else { 0 };
        let mut extra = Fields::default();
        if let Ok(seconds) = i32::try_from(item.mtime.seconds) {
            extra.u16(0x5455).u16(5).u8(1).u32(seconds.cast_unsigned());
        }
        extra.u16(0x7875).u16(11).u8(1).u8(4).u32(item.owner.uid).u8(4).u32(item.owner.gid);
        Self {
            name,
            flags,
            method: 0,
            dos_time: dos_time(item.mtime.seconds),
            extra: extra.0,
            crc: Crc::new(),
            compressed: 0,
            size: 0,
            external: 0,
            offset,
            large: false,
            spread: None,
        }
    }

    fn common(&self, fields: &mut Fields) {
        let [time, date] = self.dos_time;
        fields.u16(VERSION).u16(self.flags).u16(self.method).u16(time).u16(date);
    }

    fn name_bytes(&self) -> u16 {
        u16::try_from(self.name.len()).unwrap_or(u16::MAX)
    }

    /// The header before the content. With a descriptor, sizes and checksum are not known yet; zip64's field says that they
    /// will take eight bytes.
    fn local(&self) -> Vec<u8> {
        let mut zip64 = Fields::default();
        if self.large {
            zip64.u16(1).u16(16).u64(0).u64(0);
        }
        let size = if self.large { u32::MAX } else { capped(self.size) };
        let mut fields = Fields::default();
        fields.u32(LOCAL);
        self.common(&mut fields);
        fields.u32(self.crc.sum()).u32(size).u32(size).u16(self.name_bytes()).u16(fitting(&zip64.0, &self.extra));
        [fields.0.as_slice(), &self.name, &zip64.0, &self.extra].concat()
    }

    fn central(&self) -> Vec<u8> {
        let mut values = Fields::default();
        for value in [self.size, self.compressed, self.offset] {
            if value >= U32_MAX {
                values.u64(value);
            }
        }
        let mut zip64 = Fields::default();
        if !values.0.is_empty() {
            zip64.u16(1).u16(fitting(&values.0, &[]));
            zip64.0.extend_from_slice(&values.0);
        }
        let mut fields = Fields::default();
        fields.u32(CENTRAL).u16(MADE_BY);
        self.common(&mut fields);
        fields.u32(self.crc.sum()).u32(capped(self.compressed)).u32(capped(self.size));
        fields.u16(self.name_bytes()).u16(fitting(&zip64.0, &self.extra));
        fields.u16(0).u16(0).u16(0).u32(self.external).u32(capped(self.offset));
        [fields.0.as_slice(), &self.name, &zip64.0, &self.extra].concat()
    }
}

/// The value, or the mark that zip64's field has it.
fn capped(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Length of two pieces of extra fields, which are short.
fn fitting(a: &[u8], b: &[u8]) -> u16 {
    u16::try_from(a.len() + b.len()).unwrap_or(u16::MAX)
}

/// Time and date as DOS writes them, in UTC, from 1980 to 2107.
fn dos_time(seconds: i64) -> [u16; 2] {
    let first = [0, (1 << 5) | 1];
    let Ok(time) = Timestamp::from_second(seconds.clamp(0, 4_354_819_198)) else { return first };
    let time = time.to_zoned(TimeZone::UTC);
    let part = |value: i8| u16::try_from(value).unwrap_or(0);
    match u16::try_from(time.year() - 1980) {
        Ok(years) => [
            (part(time.hour()) << 11) | (part(time.minute()) << 5) | (part(time.second()) / 2),
            (years << 9) | (part(time.month()) << 5) | part(time.day()),
        ],
        Err(_) => first,
    }
}

/// Little-endian fields, one after another.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dos_times_are_packed_and_clamped() {
        let unpack = |[time, date]: [u16; 2]| {
            (1980 + (date >> 9), date >> 5 & 15, date & 31, time >> 11, time >> 5 & 63, (time & 31) * 2)
        };
        assert_eq!(unpack(dos_time(1_700_000_000)), (2023, 11, 14, 22, 13, 20));
        assert_eq!(unpack(dos_time(-5)), (1980, 1, 1, 0, 0, 0));
        assert_eq!(unpack(dos_time(i64::MAX)), (2107, 12, 31, 23, 59, 58));
    }
}
