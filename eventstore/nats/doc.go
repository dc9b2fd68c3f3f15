// Package nats keeps the event store in NATS JetStream.
//
// It may import eventstore and internal packages.
package nats
