//! Figures, measured on demand.
