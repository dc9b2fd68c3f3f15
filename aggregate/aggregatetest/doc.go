// Package aggregatetest tests aggregates and their commands in the words of
// the domain: given what happened, when a command comes, then this happens.
//
// It may import aggregate, command, eventstore, eventstore/memory and internal
// packages; only tests import it.
//
//	aggregatetest.For(t, accounts).
//		Given(Opened{"ann"}, Deposited{100}).
//		When(Withdraw{"ann", 500}).
//		Rejected(ErrInsufficientFunds)
//
// The command runs on the real engine, through a bus and a memory store. Beside
// what the test expects, the kit checks what deed expects of every domain:
//
//   - events come back from the log as they went in;
//   - Decide changes nothing in the state it is given, and decides the same
//     when asked again;
//   - the state kept in memory is the one that a replay gives.
package aggregatetest
