//! Tar archives: ustar headers, with pax extended headers (POSIX.1-2001) for what does not fit into them.
//!
//! Every archive is read by GNU tar. Extended attributes, ACLs among them, are `SCHILY.xattr.` records with raw values; in
//! their names `%` and `=` are written `%25` and `%3D`, as GNU tar does. Names of any bytes stand in `path` records as they are,
//! without `hdrcharset`, of which GNU tar complains. Sparse files are GNU's sparse format 1.0, so holes take no room.

use std::io::Write;

use strandline_messages::format::tree::{Hole, Timestamp};
use tar::{EntryType, Header};

use super::item::{Item, Kind, segments};
use super::{ExportError, Sink, Taken, for_people, put};

const RECORD: usize = 512;
/// Largest number of an octal field with 11 digits.
const OCTAL_11_MAX: u64 = 0o777_7777_7777;
/// Largest number of an octal field with 7 digits.
const OCTAL_7_MAX: u32 = 0o777_7777;

pub(super) struct Tar<'a> {
    out: &'a mut dyn Write,
    /// Bytes of the entry so far, as they stand in the archive.
    written: u64,
}

impl<'a> Tar<'a> {
    pub(super) fn new(out: &'a mut dyn Write) -> Self {
        Self { out, written: 0 }
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.written += bytes.len() as u64;
        put(self.out, bytes)
    }

    /// Fills up to a whole record.
    fn pad(&mut self) -> Result<(), ExportError> {
        let rest = usize::try_from(self.written % RECORD as u64).unwrap_or(0);
        self.written = 0;
        if rest == 0 { Ok(()) } else { put(self.out, [0; RECORD].get(rest..).unwrap_or_default()) }
    }

    /// A header of `name` for `size` bytes, after its extended header if it has one.
    fn head(&mut self, name: &[u8], mut header: Header, pax: &Pax) -> Result<(), ExportError> {
        set(&mut header, |ustar| &mut ustar.name, name);
        header.set_cksum();
        if !pax.0.is_empty() {
            let mut extended = Header::new_ustar();
            set(&mut extended, |ustar| &mut ustar.name, &[b"PaxHeaders/", name].concat());
            extended.set_entry_type(EntryType::XHeader);
            extended.set_mode(0o644);
            extended.set_uid(0);
            extended.set_gid(0);
            extended.set_mtime(0);
            extended.set_size(pax.0.len() as u64);
            extended.set_cksum();
            put(self.out, extended.as_bytes())?;
            self.data(&pax.0)?;
            self.pad()?;
        }
        put(self.out, header.as_bytes())
    }
}

impl Sink for Tar<'_> {
    const HARD_LINKS: bool = true;

    fn begin(&mut self, item: Item) -> Result<Taken, ExportError> {
        let mut pax = Pax::default();
        let mut header = Header::new_ustar();
        let (kind, device) = match &item.kind {
            Kind::File { .. } => (EntryType::Regular, None),
            Kind::Directory => (EntryType::Directory, None),
            Kind::Symlink(_) => (EntryType::Symlink, None),
            Kind::HardLink(_) => (EntryType::Link, None),
            Kind::Fifo => (EntryType::Fifo, None),
            Kind::CharDevice(major, minor) => (EntryType::Char, Some((*major, *minor))),
            Kind::BlockDevice(major, minor) => (EntryType::Block, Some((*major, *minor))),
            Kind::Socket => return Ok(Taken::No("tar archives hold no sockets")),
        };
        header.set_entry_type(kind);
        let (major, minor) = device.unwrap_or_default();
        if major > OCTAL_7_MAX || minor > OCTAL_7_MAX {
            let why = "its device numbers exceed 2,097,151";
            return Err(ExportError::DoesNotFit { path: for_people(&item.path), why });
        }
        let numbers = header.set_device_major(major).and_then(|()| header.set_device_minor(minor));
        numbers.map_err(ExportError::Output)?;
        if let Kind::Symlink(target) | Kind::HardLink(target) = &item.kind
            && !set(&mut header, |ustar| &mut ustar.linkname, target)
        {
            pax.add(b"linkpath", target);
        }
        attributes(&mut header, &mut pax, &item);
        let mut path = item.path;
        if matches!(item.kind, Kind::Directory) {
            path.push(b'/');
        }
        match item.kind {
            Kind::File { size, holes } if !holes.is_empty() => {
                let map = sparse_map(size, &holes);
                pax.add(b"GNU.sparse.major", b"1");
                pax.add(b"GNU.sparse.minor", b"0");
                pax.add(b"GNU.sparse.name", &path);
                pax.add(b"GNU.sparse.realsize", size.to_string().as_bytes());
                let stored = segments(size, &holes).fold(map.len() as u64, |sum, (_, bytes)| sum.saturating_add(bytes));
                set_size(&mut header, &mut pax, stored);
                self.head(&[b"GNUSparseFile.0/", path.as_slice()].concat(), header, &pax)?;
                self.data(&map)?;
            }
            kind => {
                let size = if let Kind::File { size, .. } = kind { size } else { 0 };
                set_size(&mut header, &mut pax, size);
                if path.len() > 100 {
                    pax.add(b"path", &path);
                }
                self.head(&path, header, &pax)?;
            }
        }
        Ok(Taken::Yes)
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.data(bytes)
    }

    fn end(&mut self) -> Result<(), ExportError> {
        self.pad()
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        put(self.out, &[0; 2 * RECORD])
    }
}

/// Copies into a text field as much as fits; whether that is all of it.
fn set<const N: usize>(
    header: &mut Header,
    field: impl Fn(&mut tar::UstarHeader) -> &mut [u8; N],
    text: &[u8],
) -> bool {
    // A header made by `new_ustar` is one.
    let Some(ustar) = header.as_ustar_mut() else { return false };
    let fitting = text.get(..N).unwrap_or(text);
    let field = field(ustar);
    field.fill(0);
    for (to, from) in field.iter_mut().zip(fitting) {
        *to = *from;
    }
    fitting.len() == text.len()
}

fn attributes(header: &mut Header, pax: &mut Pax, item: &Item) {
    let owner = &item.owner;
    header.set_mode(item.mode.into());
    // The header's fields take binary numbers for what octal ones cannot hold, the records are the standard's way.
    header.set_uid(owner.uid.into());
    header.set_gid(owner.gid.into());
    for (name, id) in [(b"uid", owner.uid), (b"gid", owner.gid)] {
        if id > OCTAL_7_MAX {
            pax.add(name, id.to_string().as_bytes());
        }
    }
    // These two fields end with a NUL.
    if owner.user.len() > 31 || !set(header, |ustar| &mut ustar.uname, &owner.user) {
        pax.add(b"uname", &owner.user);
    }
    if owner.group.len() > 31 || !set(header, |ustar| &mut ustar.gname, &owner.group) {
        pax.add(b"gname", &owner.group);
    }
    let seconds = u64::try_from(item.mtime.seconds).unwrap_or(0).min(OCTAL_11_MAX);
    header.set_mtime(seconds);
    if item.mtime.nanos != 0 || i64::try_from(seconds) != Ok(item.mtime.seconds) {
        pax.add(b"mtime", decimal(item.mtime).as_bytes());
    }
    // Another name of a file has the attributes of the first.
    if !matches!(item.kind, Kind::HardLink(_)) {
        for xattr in &item.xattrs {
            let mut key = b"SCHILY.xattr.".to_vec();
            for byte in &xattr.name {
                match byte {
                    b'%' => key.extend_from_slice(b"%25"),
                    b'=' => key.extend_from_slice(b"%3D"),
                    byte => key.push(*byte),
                }
            }
            pax.add(&key, &xattr.value);
        }
    }
}

fn set_size(header: &mut Header, pax: &mut Pax, size: u64) {
    header.set_size(size);
    if size > OCTAL_11_MAX {
        pax.add(b"size", size.to_string().as_bytes());
    }
}

/// Seconds with a fraction: 1.5 s before 1970 is -2 s and 500,000,000 ns, and is written `-1.5`.
fn decimal(time: Timestamp) -> String {
    let (sign, seconds, nanos) = match (time.seconds, time.nanos) {
        (seconds, 0) => return seconds.to_string(),
        (seconds, nanos) if seconds < 0 => ("-", (seconds + 1).unsigned_abs(), 1_000_000_000u32.saturating_sub(nanos)),
        (seconds, nanos) => ("", seconds.unsigned_abs(), nanos),
    };
    let fraction = format!("{nanos:09}");
    format!("{sign}{seconds}.{}", fraction.trim_end_matches('0'))
}

/// What stands before the content of a sparse file: count, then offset and length of each segment, one number a line, up to a
/// whole record. A segment of no bytes at the end of the file says how long it is.
fn sparse_map(size: u64, holes: &[Hole]) -> Vec<u8> {
    let mut parts: Vec<_> = segments(size, holes).collect();
    if parts.last().is_none_or(|(start, bytes)| start + bytes < size) {
        parts.push((size, 0));
    }
    let mut map = format!("{}\n", parts.len());
    for (start, bytes) in parts {
        map += &format!("{start}\n{bytes}\n");
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(RECORD), 0);
    map
}

/// Records of an extended header: `length key=value newline`, where the length counts itself.
#[derive(Default)]
struct Pax(Vec<u8>);

impl Pax {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length.to_string().len() + rest != length {
            length = length.to_string().len() + rest;
        }
        self.0.extend_from_slice(length.to_string().as_bytes());
        self.0.push(b' ');
        self.0.extend_from_slice(key);
        self.0.push(b'=');
        self.0.extend_from_slice(value);
        self.0.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_record_counts_its_own_digits() {
        for (value, begins) in [(0, "5 "), (3, "8 "), (4, "9 "), (5, "11 "), (90, "96 "), (93, "99 "), (94, "101 ")] {
            let mut pax = Pax::default();
            pax.add(b"k", &vec![b'v'; value]);
            let text = String::from_utf8(pax.0).unwrap();
            assert!(text.starts_with(begins), "{value}: {text}");
            assert_eq!(text.len().to_string(), begins.trim());
        }
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let time = |seconds, nanos| decimal(Timestamp { seconds, nanos });
        assert_eq!(time(1, 500_000_000), "1.5");
        assert_eq!(time(0, 1), "0.000000001");
        assert_eq!(time(-2, 500_000_000), "-1.5");
        assert_eq!(time(-1, 999_999_999), "-0.000000001");
        assert_eq!(time(-7, 0), "-7");
        assert_eq!(time(i64::MIN, 1), "-9223372036854775807.999999999");
    }

    #[test]
    fn a_sparse_map_says_where_the_segments_are_and_how_long_the_file_is() {
        let hole = |offset, bytes| Hole { offset, bytes };
        let text = |size, holes: &[Hole]| {
            let map = sparse_map(size, holes);
            assert_eq!(map.len() % 512, 0);
            String::from_utf8(map).unwrap().trim_end_matches('\0').to_owned()
        };
        assert_eq!(text(10, &[hole(2, 3)]), "2\n0\n2\n5\n5\n");
        assert_eq!(text(10, &[hole(0, 10)]), "1\n10\n0\n");
        assert_eq!(text(10, &[hole(8, 2)]), "2\n0\n8\n10\n0\n");
        let comb: Vec<_> = (0..200).map(|n| hole(n * 2, 1)).collect();
        assert!(text(400, &comb).starts_with("200\n1\n1\n3\n1\n"));
    }

    #[test]
    fn sizes_of_8_gib_and_large_ids_have_records() {
        let (mut header, mut pax) = (Header::new_ustar(), Pax::default());
        set_size(&mut header, &mut pax, (8 << 30) - 1);
        assert!(pax.0.is_empty());
        set_size(&mut header, &mut pax, 8 << 30);
        assert_eq!(pax.0, b"19 size=8589934592\n");
        assert_eq!(header.size().unwrap(), 8 << 30);
    }
}
