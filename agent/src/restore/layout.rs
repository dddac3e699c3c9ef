//! Where the content stream of a file goes in the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use strandline_messages::format::tree::Hole;

/// Where the content stream (the bytes outside of holes, one after another) goes in the file.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Length of the file, bytes.
    pub(super) size: u64,
    /// Bytes of the content stream.
    pub(super) content: u64,
    holes: Vec<Hole>,
    /// Start in the content stream, start in the file; ascending.
    regions: Vec<(u64, u64)>,
}

impl Layout {
    pub(super) fn new(size: u64, holes: &[Hole]) -> Self {
        let (mut stream, mut file) = (0u64, 0u64);
        let mut regions = Vec::new();
        for hole in holes {
            if hole.offset > file {
                regions.push((stream, file));
                stream += hole.offset - file;
            }
            file = hole.offset.saturating_add(hole.bytes);
        }
        regions.push((stream, file));
        Self { size, content: stream + size.saturating_sub(file), holes: holes.to_vec(), regions }
    }

    /// Where the file has holes, ascending.
    pub(super) fn holes(&self) -> &[Hole] {
        &self.holes
    }

    /// The parts of the file that `bytes` bytes at `offset` of the content stream fill: offset in the file, length.
    pub(super) fn parts(&self, offset: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> {
        let first = self.regions.partition_point(|(stream, _)| *stream <= offset).saturating_sub(1);
        let regions = self.regions.get(first..).unwrap_or_default();
        let ends = regions.iter().skip(1).map(|(stream, _)| *stream).chain([u64::MAX]);
        let last = offset.saturating_add(bytes);
        regions.iter().zip(ends).map_while(move |((stream, file), end)| {
            let from = offset.max(*stream);
            let to = last.min(end);
            (from < to).then(|| (file.saturating_add(from - stream), to - from))
        })
    }

    /// Reads bytes of the content stream, a chunk at most, into `buffer`, whose length says how many.
    pub(super) fn read(&self, file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        for (place, length) in self.parts(offset, rest.len() as u64) {
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at_mut(length);
            file.read_exact_at(part, place)?;
            rest = after;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_goes_around_the_holes() {
        let hole = |offset, bytes| Hole { offset, bytes };
        let parts = |layout: &Layout, offset, bytes| layout.parts(offset, bytes).collect::<Vec<_>>();
        let plain = Layout::new(100, &[]);
        assert_eq!(plain.content, 100);
        assert_eq!(parts(&plain, 10, 20), [(10, 20)]);
        assert_eq!(parts(&plain, 10, 0), []);
        let sparse = Layout::new(100, &[hole(0, 10), hole(20, 5), hole(90, 10)]);
        assert_eq!(sparse.content, 75);
        assert_eq!(parts(&sparse, 0, 75), [(10, 10), (25, 65)]);
        assert_eq!(parts(&sparse, 5, 10), [(15, 5), (25, 5)]);
        assert_eq!(parts(&sparse, 10, 1), [(25, 1)]);
        let empty = Layout::new(100, &[hole(0, 100)]);
        assert_eq!(empty.content, 0);
        let absurd = Layout::new(u64::MAX, &[hole(0, u64::MAX)]);
        assert_eq!(parts(&absurd, 5, 10), [(u64::MAX, 10)], "which the system will refuse");
    }
}
