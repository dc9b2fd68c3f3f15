// Package command executes commands: structs that decide, on the state of an
// aggregate, which events happen.
//
// It may import eventstore, aggregate, and internal packages.
//
// # A tour
//
// A command names its aggregate and decides. It is pure, so it can be decided
// again when another writer came first:
//
//	type Deposit struct{ Account string; Cents int64 }
//
//	func (c Deposit) AggregateID() string { return c.Account }
//
//	func (c Deposit) Decide(a Account) ([]aggregate.Event, error) {
//		if a.Owner == "" {
//			return nil, command.Rejectf("account %q is not open", c.Account)
//		}
//		return aggregate.Events(Deposited{c.Cents}), nil
//	}
//
// A [Bus] executes it on the definition of its aggregate, and returns when its
// events are durable. A command for another state does not compile:
//
//	bus := command.NewBus(runtime, command.Options{})
//	receipt, err := command.Execute(ctx, bus, accounts, Deposit{"ann", 500})
//
// A [Rejection] is the domain's no, made by [Reject] or [Rejectf] and told
// apart from failures by [IsRejection].
//
// With a [Key] a command takes effect once, however often it is sent:
//
//	command.Execute(ctx, bus, accounts, Deposit{"ann", 500}, command.Key(requestID))
//
// What the context says about who asks and why goes into the metadata of the
// events: [WithActor], [WithCorrelation], [WithCausation], [CausedBy],
// [WithExtra]. [Middleware] wraps every command of a bus: [Validate],
// [Authorize], [Log], [Timing], or your own.
//
// Commands may have two more methods: Validate() error checks what needs no
// state, and Boundary() (eventstore.Query, S) makes the command one about all
// events that match a query; see [Command].
package command
