// Package eventstore is the contract every deed backend fulfils: an append-only
// log of events, grouped in streams, with conditions checked at the moment of
// the append and subscriptions that never skip.
//
// It imports nothing else of deed; every other package stands on it.
//
// # A tour
//
// An [Event] belongs to a [Stream], for example category "account", ID "ann".
// Events are appended in a [Commit], all or nothing:
//
//	receipt, err := store.Append(ctx, eventstore.Commit{
//		Events:     []eventstore.Event{{Stream: ann, Type: "account.opened", Data: []byte(`{"Owner":"Ann"}`)}},
//		Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}, // must not exist yet
//	})
//
// A [Condition] says what must still be true when the events are written:
// [StreamAt], [StreamExists], or [NoneMatch] for a dynamic consistency
// boundary over a [Query]. When it is not, nothing is written and the error is
// a [*ConflictError], which errors.Is recognises as [ErrConflict].
//
// What was stored comes back as [Recorded] events, with the version within the
// stream and the position within the log:
//
//	for event, err := range store.Read(ctx, eventstore.OneStream(ann), eventstore.ReadOptions{}) { … }
//	for batch, err := range store.Subscribe(ctx, eventstore.All(), 0) { … } // catches up, then follows
//
// # Encoding
//
// The store keeps bytes. [Encoding] turns them into the values of the domain
// and back: JSON unless an event type names another [Codec], and upcasters
// that lead old schema versions to the current one on every read path.
//
// Unknown event types have one policy: an aggregate refuses to load
// ([ErrUnknownType]), because deciding on half of its history would be wrong;
// a projection skips the types it does not handle.
package eventstore
