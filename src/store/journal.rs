// stand-in until the journal is merged
use super::change::Change;
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Place { pub file: u32, pub offset: u32, pub len: u32 }
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Slot { pub offset: u32, pub len: u32 }
#[derive(Default)]
pub struct Group { bytes: Vec<u8>, records: Vec<(u64, Slot)> }
impl Group {
    pub fn new() -> Group { Group::default() }
    pub fn append(&mut self, seq: u64, change: &Change<'_>) -> Slot {
        let offset = self.bytes.len() as u32;
        change.encode(&mut self.bytes);
        let slot = Slot { offset, len: self.bytes.len() as u32 - offset };
        self.records.push((seq, slot));
        slot
    }
    pub fn payload(&self, slot: Slot) -> &[u8] { &self.bytes[slot.offset as usize..][..slot.len as usize] }
    pub fn is_empty(&self) -> bool { self.records.is_empty() }
    pub fn records(&self) -> &[(u64, Slot)] { &self.records }
    pub fn bytes(&self) -> usize { self.bytes.len() }
    pub fn clear(&mut self) { self.bytes.clear(); self.records.clear(); }
}
