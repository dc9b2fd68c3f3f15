// Package postgres keeps the log and the state in PostgreSQL. It may import
// eventstore, the state contract of projection, and internal packages.
package postgres
