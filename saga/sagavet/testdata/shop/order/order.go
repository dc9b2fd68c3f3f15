// Package order has sagas that take steps in the order of a map.
package order

import (
	"iter"
	"maps"
	"slices"
	"sync"

	"github.com/deed-go/deed/saga"
)

type lines map[string]int

func run(s *saga.Run, in lines) (int, error) {
	for sku := range in { // want `^steps in the order of a map, which is another one at every replay; sort its keys first: for _, key := range slices.Sorted\(maps.Keys\(in\)\)$`
		if err := saga.Execute(s, sku, sku); err != nil {
			return 0, err
		}
	}
	for sku := range maps.Keys(in) { // want `in the order of a map`
		undo(s, sku)
	}
	for _, sku := range slices.Collect(maps.Keys(in)) { // want `in the order of a map`
		s.OnRollback(sku, func(*saga.Run) error { return nil })
	}
	reserve := func(sku string) error { return saga.Execute(s, sku, sku) }
	both := func(sku string) { _, _ = reserve(sku), reserve(sku) }
	for sku := range in { // want `in the order of a map`
		both(sku)
	}
	for _, sku := range slices.Sorted(maps.Keys(in)) {
		both(sku)
	}
	var list []string
	for sku := range in {
		list = append(list, sku)
	}
	slices.Sort(list)
	for _, sku := range list {
		both(sku)
	}
	var branches []func(*saga.Run) error
	for sku := range in { // want `in the order of a map`
		branches = append(branches, func(b *saga.Run) error { return saga.Execute(b, sku, sku) })
	}
	return len(in), saga.All(s, "all", branches...)
}

func undo(s *saga.Run, sku string) {
	s.OnRollback(sku, func(s *saga.Run) error { return saga.Execute(s, sku, sku) })
}

func generic[M ~map[string]V, V any](s *saga.Run, m M, names iter.Seq[string]) {
	for sku := range m { // want `in the order of a map`
		undo(s, sku)
	}
	for sku := range names {
		undo(s, sku)
	}
}

// Steps may do as they like.
func step(ctx saga.Step, m map[string]int, shared *sync.Map) (n int, err error) {
	for range m {
		n++
	}
	return n, nil
}
