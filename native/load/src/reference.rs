//! Inputs, and the outputs that they must have, from a file: four 32-bit numbers (variants, steps, inputs, outputs of a row),
//! then the inputs and the outputs as float32.

use crate::Failure;

pub struct Reference {
    variants: usize,
    steps: usize,
    inputs: usize, // numbers of a row
    outputs: usize,
    x: Vec<u8>,
    y: Vec<u8>,
}

impl Reference {
    pub fn read(path: &str) -> Result<Self, Failure> {
        let bytes = std::fs::read(path)?;
        let head: Vec<usize> = bytes
            .as_chunks()
            .0
            .iter()
            .take(4)
            .map(|four| u32::from_le_bytes(*four) as usize)
            .collect();
        let [variants, steps, inputs, outputs] = head[..] else {
            return Err(format!("{path} is too short").into());
        };
        let middle = 16 + 4 * variants * steps * inputs;
        if bytes.len() != middle + 4 * variants * steps * outputs {
            return Err(format!("{path} has not the length that its head says").into());
        }
        Ok(Reference {
            variants,
            steps,
            inputs,
            outputs,
            x: bytes[16..middle].to_vec(),
            y: bytes[middle..].to_vec(),
        })
    }

    pub fn output_nbytes(&self) -> usize {
        4 * self.outputs
    }

    pub fn input(&self, session: usize, seq: u64) -> &[u8] {
        let row = session % self.variants * self.steps + (seq as usize - 1) % self.steps;
        &self.x[4 * row * self.inputs..][..4 * self.inputs]
    }

    /// How far an output is from what it must be; None beyond the steps that are known.
    pub fn error(&self, session: usize, seq: u64, output: &[u8]) -> Option<f32> {
        if seq as usize > self.steps {
            return None;
        }
        let row = session % self.variants * self.steps + seq as usize - 1;
        let wanted = &self.y[4 * row * self.outputs..][..4 * self.outputs];
        let number = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
        let pairs = wanted.as_chunks().0.iter().zip(output.as_chunks().0);
        Some(
            pairs
                .map(|(one, other)| (number(one) - number(other)).abs())
                .fold(0.0, f32::max),
        )
    }
}
