// Package aggregate turns a state struct and one small function per event into
// an aggregate: loaded, cached, decided upon and written without losing or
// reordering anything.
//
// It may import eventstore and internal packages.
package aggregate
